"""An S3 endpoint on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def object_store(bucket: str = "runs") -> Iterator[str]:
    """The address of an empty bucket, with all that a client needs to reach it.

    The server is a thread of this process; other processes reach it too.
    """
    import boto3  # here, so that workers of a test do not wait for these imports
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        ).create_bucket(Bucket=bucket)
        settings = f"scheme=http&endpoint_override={host}%3A{port}&region=us-east-1"
        yield f"s3://key:secret@{bucket}/?{settings}"
    finally:
        server.stop()


def inside(address: str, path: str) -> str:
    """The address of a folder in the bucket."""
    return address.replace("/?", f"/{path}?")
