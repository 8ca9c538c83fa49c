"""Content credentials beside an output: a signed C2PA manifest that says a model has restored the picture.

C2PA   Content Credentials: C2PA Technical Specification 2.4 (claim version 2, an external manifest)
IPTC   NewsCodes, digital source type

The certificate and its key belong to the archive; c2pa-python is an optional package, loaded when it is asked for.
Nothing goes over the network: there is no time stamp, so a manifest is valid for as long as the signer's certificate.
Whether a signer is to be trusted is not judged here, since that needs a list of trusted authorities: who can sign can
also sign a changed file again.
"""

import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from engine import __version__
from engine.errors import OutputUnsupported, PlanError, StorageError, UnreadableInput
from engine.outputs import output_folders
from engine.receipt import read_receipt
from engine.store import digest_of, write_atomic

if TYPE_CHECKING:
    from c2pa import C2paSignerInfo, Context
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

SUFFIX = ".c2pa"
"""Of the manifest of `scan.tif`: `scan.tif.c2pa`."""
RESTORATION = "org.cra-srgan-engine.restoration"
"""The label of our own assertion: the plan, the digest of the input, the model and the share of generated pixels."""

_FORMATS = ("tiff", "png", "jpeg")
_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_MEDIA_TYPE = "application/octet-stream"
"""Hashes every byte of the file, in pieces: at most about 520 MB of memory were seen. By its own type, c2pa 0.91 reads
a TIFF or JPEG whole. Readers that know the type come to the same hash."""
_EXTENDED_KEY_USAGES = {
    "c2pa-kp-claimSigning": "1.3.6.1.4.1.62558.2.1",
    "id-kp-documentSigning": "1.3.6.1.5.5.7.3.36",
    "id-kp-emailProtection": "1.3.6.1.5.5.7.3.4",
}
_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "trust": {"trust_config": "\n".join(_EXTENDED_KEY_USAGES.values())},
    # what was signed is checked below, by reading the file again
    "verify": {"verify_trust": False, "verify_after_sign": False, "ocsp_fetch": False, "remote_manifest_fetch": False},
}
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


def credentials_path(output: Path) -> Path:
    """Where the manifest of an output lies."""
    return output.with_name(output.name + SUFFIX)


def sign_outputs(out: Path, *, certificates: Path, key: Path) -> Iterator[Path]:
    """Signs every TIFF, PNG and JPEG that the receipts below a folder of outputs name, and yields the manifests.

    Raises UnreadableInput for a folder without one, and what `write_credentials` raises.
    """
    receipts = [
        (folder, found)
        for folder in output_folders(out)
        for path in sorted(folder.glob("*.json"))
        if (found := read_receipt(path)) is not None
    ]
    named = [
        (folder / made["name"], receipt)
        for folder, receipt in receipts
        for fmt, made in receipt["outputs"].items()
        if fmt in _FORMATS
    ]
    if not named:
        formats = ", ".join(_FORMATS)
        raise UnreadableInput(f"{out}: {len(receipts)} receipts, of which 0 name a {formats}; give a folder of outputs")
    for path, receipt in named:
        yield write_credentials(path, receipt, certificates=certificates, key=key)


def write_credentials(output: Path, document: Mapping[str, Any], *, certificates: Path, key: Path) -> Path:
    """Signs what a receipt says of a TIFF, PNG or JPEG and stores it beside the file, which stays as it is.

    `document`: what `engine.receipt` has recorded. `certificates`: PEM, the signer's first, then its intermediates.
    `key`: its private key, PEM without a password; ECDSA (P-256, P-384, P-521), RSA or Ed25519. An earlier manifest is
    replaced. Raises OutputUnsupported for other formats, PlanError for a missing package, for a key or certificate that
    cannot sign, and for a file that is not the recorded one, and StorageError.
    """
    if output.suffix.lower() not in _SUFFIXES:
        raise OutputUnsupported(
            f"{output}: content credentials are written for {', '.join(_SUFFIXES)}, not for "
            f"'{output.suffix}'; export the picture as tiff, png or jpeg, and sign that."
        )
    c2pa = _library()
    signer = _signer_info(c2pa, certificates, key)
    _require_recorded(output, document)
    manifest = _sign(c2pa, output, _definition(output, document), signer, certificates)
    wrong = _mismatches(c2pa, output, manifest)
    if wrong:
        raise PlanError(
            f"{output}: what was signed is not valid: {'; '.join(wrong)}. Nothing was written; give a certificate for "
            f"{' or '.join(_EXTENDED_KEY_USAGES)}, and let nothing else write the file."
        )
    sidecar = credentials_path(output)
    write_atomic(sidecar, manifest)
    return sidecar


def check_credentials(output: Path) -> list[str]:
    """What does not hold of the manifest beside an output: a sentence each, none if the signature and all hashes match.

    A certificate that has expired is named, one that no trusted authority has issued is not. Raises PlanError without
    the package.
    """
    c2pa, sidecar = _library(), credentials_path(output)
    try:
        manifest = sidecar.read_bytes()
    except OSError as error:
        return [f"{sidecar.name}: cannot be read ({error.strerror})"]
    return _mismatches(c2pa, output, manifest)


def _library() -> ModuleType:
    try:
        import c2pa
    except ImportError as error:
        raise PlanError(
            "content credentials need the package c2pa-python; pip install 'cra-srgan-engine[c2pa]'"
        ) from error
    return c2pa


def _require_recorded(output: Path, document: Mapping[str, Any]) -> None:
    """Nothing is signed about a file that the record does not know."""
    recorded = [entry["sha256"] for entry in document["outputs"].values() if entry["name"] == output.name]
    if not recorded:
        names = ", ".join(entry["name"] for entry in document["outputs"].values())
        raise PlanError(f"{output}: is not in the record, which names {names}; give the record of this file")
    found = digest_of(output).sha256
    if found not in recorded:
        raise PlanError(
            f"{output}: its SHA-256 is {found}, recorded was {recorded[0]}; it was changed since: restore it again"
        )


def _definition(output: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as c2pa wants it told."""
    source, generated, model = document["input"], document["generated"], document["model"]
    engine = {"name": "cra-srgan-engine", "version": document["software"]["cra-srgan-engine"]}
    kind = "compositeWithTrainedAlgorithmicMedia" if generated["share"] > 0 else "algorithmicallyEnhanced"
    opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": ["input"]}}
    edited = {
        "action": "c2pa.edited",
        "when": document["finished"],
        "softwareAgent": engine,
        "digitalSourceType": _SOURCE_TYPE + kind,
        "description": generated["statement"],
    }
    restoration = {
        "plan_id": document["plan_id"],
        "input": {name: source[name] for name in ("name", "sha256")},
        "model": {name: model[name] for name in ("name", "sha256", "licence")},
        "generated": {name: generated[name] for name in ("share", "statement")},
    }
    return {
        "claim_version": 2,
        "claim_generator_info": [{"name": "cra-srgan-engine", "version": __version__}],
        "title": output.name,
        "ingredients": [{"title": source["name"], "relationship": "parentOf", "label": "input"}],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [opened, edited]}},
            {"label": RESTORATION, "data": restoration},
        ],
    }


def _signer_info(c2pa: ModuleType, certificates: Path, key: Path) -> "C2paSignerInfo":
    """Raises PlanError where the key and the certificate do not belong together, or are of no use today."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
    from cryptography.x509 import load_pem_x509_certificates

    try:
        private = load_pem_private_key(_read(key), password=None)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise PlanError(f"{key}: is not a private key in PEM without a password ({error}); give one") from error
    try:
        chain = load_pem_x509_certificates(_read(certificates))
    except ValueError as error:
        raise PlanError(f"{certificates}: is not a list of certificates in PEM ({error}); give one") from error
    signer = chain[0]
    if signer.public_key() != private.public_key():
        raise PlanError(
            f"{certificates}: its first certificate ({signer.subject.rfc4514_string()}) is not that of the key "
            f"{key}; give the signer's own certificate first"
        )
    now, begin, end = datetime.now(UTC), signer.not_valid_before_utc, signer.not_valid_after_utc
    if not begin <= now <= end:
        raise PlanError(
            f"{certificates}: is valid from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC, now is "
            f"{now:%Y-%m-%d %H:%M}; give a certificate that is valid today"
        )
    pem = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return c2pa.C2paSignerInfo(_algorithm(private, key), pem, secret, None)


def _algorithm(private: "PrivateKeyTypes", key: Path) -> str:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    match private:
        case EllipticCurvePrivateKey() if private.curve.name in _CURVES:
            return _CURVES[private.curve.name]
        case RSAPrivateKey():
            return "ps256"
        case Ed25519PrivateKey():
            return "ed25519"
        case _:
            kind = private.curve.name if isinstance(private, EllipticCurvePrivateKey) else type(private).__name__
            raise PlanError(f"{key}: C2PA has no signature for {kind}; give a P-256, P-384, P-521, RSA or Ed25519 key")


def _sign(
    c2pa: ModuleType, output: Path, definition: Mapping[str, Any], signer: "C2paSignerInfo", certificates: Path
) -> bytes:
    try:
        with (
            output.open("rb") as source,
            open(os.devnull, "r+b") as copy,  # c2pa also writes the picture, which we have
            c2pa.Signer.from_info(signer) as signing,
            c2pa.Builder(definition, _context(c2pa)) as builder,
        ):
            builder.set_no_embed()
            return builder.sign(signing, _MEDIA_TYPE, source, copy)
    except OSError as error:
        raise StorageError(f"{output}: cannot be read ({error.strerror}); check the disk, then sign again") from error
    except c2pa.C2paError as error:
        raise PlanError(
            f"{output}: cannot be signed with {certificates} ({error}); give a version 3 certificate that is no "
            f"authority's, for digitalSignature and {' or '.join(_EXTENDED_KEY_USAGES)}"
        ) from error


def _mismatches(c2pa: ModuleType, output: Path, manifest: bytes) -> list[str]:
    sidecar = credentials_path(output).name
    try:
        with output.open("rb") as source, c2pa.Reader(_MEDIA_TYPE, source, manifest, context=_context(c2pa)) as reader:
            is_valid = reader.get_validation_state() in ("Valid", "Trusted")
            failures = reader.get_validation_results()["activeManifest"]["failure"]
    except OSError as error:
        return [f"{output.name}: cannot be read ({error.strerror})"]
    except c2pa.C2paError as error:
        return [f"{sidecar}: is no C2PA manifest, or was changed ({error})"]
    if is_valid:
        return []
    sentences = [
        f"{output.name}: is not the file that was signed"
        if failure["code"] == "assertion.dataHash.mismatch"
        else f"{sidecar}: {failure['explanation']} ({failure['code']})"
        for failure in failures
    ]
    return sentences or [f"{sidecar}: what it holds of the pictures this one was made from was changed"]


def _context(c2pa: ModuleType) -> "Context":
    return c2pa.Context(c2pa.Settings.from_dict(_SETTINGS))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror}); give a file that this user may read") from error
