"""Everything that can go wrong for a user, one class per cause.

    EngineError
    ├── InputError                 this picture cannot be restored; the others go on (exit 3)
    │   ├── UnreadableInput        missing, empty, truncated, or damaged beyond decoding
    │   ├── UnsupportedInput       a format, colour model or bit depth that is not restored
    │   ├── DisguisedInput         the content is not what the name says
    │   ├── TooManyPixels          the header announces more pixels than the limit
    │   ├── MaskMismatch           the mask is of another size than the picture
    │   ├── MaskUnavailable        no mask was found, or the model cannot make one
    │   ├── NothingKnown           every pixel is missing: there is nothing to restore from
    │   ├── DecoderCrashed         a decoder ended the process that read the file
    │   ├── DecoderTimeout         a decoder did not come to an end in time
    │   └── DecoderOutOfMemory     a decoder wanted more memory than it may have
    ├── ModelError                 a checkpoint or its card cannot be used
    ├── PlanError                  the work cannot finish as asked; nothing was written (exit 4)
    │   ├── NotEnoughMemory
    │   ├── NotEnoughDisk
    │   ├── OutputTooLarge         a format cannot hold a picture of that size
    │   ├── OutputUnsupported      a format cannot hold these channels or bits
    │   ├── OutputExists           another plan's finished work is in the way
    │   ├── OutputBusy             another process is writing the same plan
    │   ├── NoCluster              no Ray answers, and none can be started
    │   └── TooFewCpus, TooFewGpus the cluster cannot run the workers that are asked for
    ├── StorageError               the disk refused a write while the work ran (exit 3)
    │   ├── StorageFull
    │   └── StorageReadOnly
    ├── BatchError                 many pictures (exit 3)
    │   ├── ProcessDied            a picture ended or held up every process that tried it
    │   └── BatchStalled           nothing moves on the cluster any more
    ├── ServiceError               the endpoint does not take a request
    │   ├── BadRequest             it is not what the interface says
    │   ├── Unauthorized           it carries no key that is known
    │   ├── NotFound               nothing is there, or nothing of this key's
    │   ├── NotReady               the picture has not ended as this needs
    │   ├── Conflict               the idempotency key was used for something else
    │   ├── BodyTooLarge           more bytes than are taken
    │   ├── SlowClient             the client sent nothing for too long
    │   ├── Busy                   not now
    │   │   ├── TooManyRequests    this key has its share of the queue
    │   │   └── QueueFull          all keys together have filled it
    │   └── StoreFull              the disk, or this key's part of it
    └── TrainingError              a training run cannot start or go on

Every message names the file, gives both numbers and ends with the remedy. `code` is stable: programs may
match it.
"""

EXIT_FAILED = 3
EXIT_REFUSED = 4


def printable(text: str) -> str:
    """One line in which what a file name holds beside letters is shown escaped, not obeyed by a terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class EngineError(ValueError):
    """A cause that a user can understand and act on."""

    code = "error"


def codes(*kinds: type[EngineError]) -> set[str]:
    """The codes of kinds of errors and of all below them."""
    return {kind.code for kind in kinds}.union(*(codes(*kind.__subclasses__()) for kind in kinds))


class InputError(EngineError):
    code = "input"


class UnreadableInput(InputError):
    code = "unreadable-input"


class UnsupportedInput(InputError):
    code = "unsupported-input"


class DisguisedInput(InputError):
    code = "disguised-input"


class TooManyPixels(InputError):
    code = "too-many-pixels"


class MaskMismatch(InputError):
    code = "mask-mismatch"


class MaskUnavailable(InputError):
    code = "mask-unavailable"


class NothingKnown(InputError):
    code = "nothing-known"


class DecoderCrashed(InputError):
    code = "decoder-crashed"


class DecoderTimeout(InputError):
    code = "decoder-timeout"


class DecoderOutOfMemory(InputError):
    code = "decoder-out-of-memory"


class ModelError(EngineError):
    code = "model"


class DecoderUnavailable(EngineError):
    """Not the file's fault."""

    code = "decoder-unavailable"


class PlanError(EngineError):
    code = "plan"


class NotEnoughMemory(PlanError):
    code = "not-enough-memory"


class NotEnoughDisk(PlanError):
    code = "not-enough-disk"


class OutputTooLarge(PlanError):
    code = "output-too-large"


class OutputUnsupported(PlanError):
    code = "output-unsupported"


class OutputExists(PlanError):
    code = "output-exists"


class OutputBusy(PlanError):
    code = "output-busy"


class NoCluster(PlanError):
    code = "no-cluster"


class TooFewCpus(PlanError):
    code = "too-few-cpus"


class TooFewGpus(PlanError):
    code = "too-few-gpus"


class StorageError(EngineError):
    code = "storage"


class StorageFull(StorageError):
    code = "storage-full"


class StorageReadOnly(StorageError):
    code = "storage-read-only"


class BatchError(EngineError):
    code = "batch"


class ProcessDied(BatchError):
    code = "process-died"


class BatchStalled(BatchError):
    code = "batch-stalled"


class ServiceError(EngineError):
    code = "service"


class BadRequest(ServiceError):
    code = "bad-request"


class Unauthorized(ServiceError):
    code = "unauthorized"


class NotFound(ServiceError):
    code = "not-found"


class NotReady(ServiceError):
    code = "not-ready"


class Conflict(ServiceError):
    code = "conflict"


class BodyTooLarge(ServiceError):
    code = "body-too-large"


class SlowClient(ServiceError):
    code = "slow-client"


class Busy(ServiceError):
    """`retry_after_s`: when it is worth to ask again."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyRequests(Busy):
    code = "too-many-requests"


class QueueFull(Busy):
    code = "queue-full"


class StoreFull(ServiceError):
    code = "store-full"


class TrainingError(EngineError):
    code = "training"
