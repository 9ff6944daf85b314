"""Certificates for tests of TLS, made here and thrown away."""

import shutil
import subprocess
from pathlib import Path

import pytest


def make_certificates(folder: Path) -> Path:
    """Writes ca.pem, and server.pem with server.key for shop.example; skips where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates, and there is none")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    (folder / "server.ext").write_text("subjectAltName=DNS:shop.example\n")
    for command in (
        ["req", "-x509", *key, "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.pem"],
        ["req", *key[:-2], "-subj", "/CN=shop.example", "-keyout", "server.key", "-out", "server.csr"],
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile server.ext".split()
        + ["-out", "server.pem"],
    ):
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)
    return folder
