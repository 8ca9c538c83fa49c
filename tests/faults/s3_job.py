"""`engine restore` with small shards and outputs on an object store, to be killed."""

from tests.e2e.kill_job import job, small
from tests.forked import serve

if __name__ == "__main__":
    small()
    serve(job)
