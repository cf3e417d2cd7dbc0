"""Fresh processes without the seconds that importing PyTorch and sentence-transformers takes.

Each is forked from a process that has imported these two, and nothing of st_clp. What such an import itself does cannot
be tested so: for that there is ``subprocess``.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

SECONDS = 300  # after which a process is killed
ORIGIN = "import torch, sentence_transformers; from {module} import _serve; _serve()"


def run_fresh(
    code: str,
    *arguments: object,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` as ``python -c`` would.

    Args:
        code: What to run.
        arguments: Its ``sys.argv[1:]``.
        cwd: Where to run it; None: here.
        env: Variables to add to the environment.
        stdin: What it can read.
        check: Fail where it does.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "stdin").write_text(stdin)
        argv = ["-c", *map(str, arguments)]
        task = {"code": code, "argv": argv, "cwd": str(cwd or Path.cwd()), "env": dict(env or {}), "folder": name}
        origin = _origin()
        assert origin.stdin is not None
        assert origin.stdout is not None
        origin.stdin.write(json.dumps(task) + "\n")
        origin.stdin.flush()
        returned = int(origin.stdout.readline())
        out, err = ((folder / stream).read_text() for stream in ("stdout", "stderr"))
    done = subprocess.CompletedProcess(argv, returned, out, err)
    assert not (check and returned), err
    return done


def run_fresh_script(script: Path, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script as ``python script`` would, in a process as :func:`run_fresh` has it."""
    code = f"import runpy, sys; sys.argv[0] = {str(script)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    return run_fresh(code, *arguments, check=check)


@lru_cache
def _origin() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", ORIGIN.format(module=__name__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    atexit.register(process.kill)
    return process


def _serve() -> None:
    """Fork a process for each line, and answer with what it returned."""
    assert "st_clp" not in sys.modules
    gc.collect()
    gc.freeze()  # so that no garbage collection of a child's looks at it
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if not child:
            os._exit(_run(task))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(task: dict[str, Any]) -> int:
    for number, (name, flags) in enumerate(
        [("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY | os.O_CREAT), ("stderr", os.O_WRONLY | os.O_CREAT)]
    ):
        os.dup2(os.open(Path(task["folder"], name), flags), number)
    signal.alarm(SECONDS)
    os.chdir(task["cwd"])
    os.environ.update(task["env"])
    sys.argv, sys.path[0] = task["argv"], ""
    returned = 0
    try:
        exec(compile(task["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        returned = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        returned = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return returned
