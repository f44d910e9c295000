"""Emulators of Azure Blob Storage (azurite, of npm) and of Google Cloud Storage (gcp-storage-emulator)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.oracles.servers.processes import free_port, server

__all__ = ["Cloud", "azure_server", "gcs_server"]

# The account that every azurite has; its key is in the documentation of azurite.
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class Cloud:
    """An emulator that runs: the URL of its container ``tests``, and the variables of its user."""

    url: str
    variables: dict[str, str]


@contextmanager
def azure_server(root: Path) -> Iterator[Cloud]:
    """Run azurite, with one container."""
    adlfs = pytest.importorskip("adlfs", reason="needs adlfs, of the extra [az]")
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("needs azurite: npm install -g azurite")
    port = free_port()
    command: list[str | Path] = [
        program, "--location", root, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--skipApiVersionCheck",
    ]  # fmt: skip
    with server(command, port, root / "azurite.log"):
        connection = (
            f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={_KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/{_ACCOUNT};"
        )
        adlfs.AzureBlobFileSystem(connection_string=connection, skip_instance_cache=True).mkdir("tests")
        yield Cloud("az://tests", {"AZURE_STORAGE_CONNECTION_STRING": connection})


@contextmanager
def gcs_server(root: Path) -> Iterator[Cloud]:
    """Run the emulator, with one bucket."""
    pytest.importorskip("gcsfs", reason="needs gcsfs, of the extra [gs]")
    program = Path(sys.executable).with_name("gcp-storage-emulator")
    if not program.exists():
        pytest.skip("needs gcp-storage-emulator")
    port = free_port()
    command: list[str | Path] = [
        program, "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", "tests",
    ]  # fmt: skip
    with server(command, port, root / "gcs.log"):
        variables = {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks for the kind of bucket by gRPC
        }
        yield Cloud("gs://tests", variables)
