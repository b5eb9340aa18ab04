"""Compiles C++ against the headers of the installed Paddle, for kernels that only tests need."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import paddle


def why_not() -> str | None:
    """Why nothing can be compiled on this machine; None if it can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    root = Path(paddle.__file__).parent
    return None if (root / "include" / "paddle" / "phi").is_dir() else "this Paddle has no C++ headers"


def library(source: Path) -> Path:
    """The shared library made of a source file. It is kept in the user's temporary directory, so that each text is
    compiled once for each version of Paddle.
    """
    root = Path(paddle.__file__).parent
    text = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"erniekit-test-{source.stem}-{paddle.__version__}-{os.getuid()}-{text}.so"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        include = [f"-I{root / 'include'}", f"-I{root / 'include' / 'third_party'}"]
        libraries = [f"-L{root / 'libs'}", "-l:libphi_core.so", "-l:libphi.so", "-l:libcommon.so"]
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w"]
        subprocess.run(["g++", *flags, *include, str(source), "-o", str(part), *libraries], check=True)
        part.replace(path)
    return path
