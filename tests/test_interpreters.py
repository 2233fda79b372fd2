"""The script alone in an empty folder, on every Python found, with the oldest and the newest client that it takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.program import SCRIPT

VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13")
CLIENTS = {"oldest": "openai==1.0.0", "newest": "openai"}


def uv(*argv: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if program is None:
        pytest.skip("needs uv to make an environment per interpreter")
    env = {**os.environ, "UV_PYTHON_DOWNLOADS": "never", "UV_SYSTEM_CERTS": "true", "UV_NATIVE_TLS": "true"}
    return subprocess.run([program, *argv], capture_output=True, text=True, env=env, timeout=120, check=False)


def interpreter(version: str) -> str:
    """A Python of this version: of pyenv's where that is installed, else the one on the path."""
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True).stdout.strip()
        found = sorted(Path(root, "versions").glob(f"{version}.*/bin/python"))
        if found:
            return str(found[-1])
    on_path = shutil.which(f"python{version}")
    if on_path is None:
        pytest.skip(f"no Python {version} here")
    return on_path


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_script_alone_runs_help_and_demo(version: str, client: str, tmp_path: Path) -> None:
    made = uv("venv", "-q", "--no-project", "--python", interpreter(version), str(tmp_path / "env"))
    assert made.returncode == 0, made.stderr
    python = tmp_path / "env" / "bin" / "python"
    installed = uv("pip", "install", "-q", "--python", str(python), CLIENTS[client])
    if installed.returncode:
        pytest.skip(f"cannot install {CLIENTS[client]}: {installed.stderr[-200:]}")
    folder = tmp_path / "empty"
    folder.mkdir()
    for script in (SCRIPT, SCRIPT.with_name("demo_server.py")):
        shutil.copy(script, folder)

    def run(*argv: str) -> str:
        command = [str(python), "-I", "-W", "error", SCRIPT.name, *argv]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "--concurrency" in run("--help")
    sizes = ["--concurrency", "4", "--total-requests", "8", "--prompt-tokens", "32", "--output-tokens", "8"]
    alone = run("--demo", *sizes)
    assert "Requests (ok/err): 8/0" in alone
    assert "transport stopwatch" in alone  # over h11, which comes with every client
    if version not in (VERSIONS[0], VERSIONS[-1]):
        return
    helped = uv("pip", "install", "-q", "--python", str(python), "httptools")
    assert helped.returncode == 0, helped.stderr
    truer = run("--demo", *sizes, "--stream")
    assert "Requests (ok/err): 8/0" in truer
    assert "transport stopwatch" in truer
