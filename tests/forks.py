"""Python processes without the time of imports: a server that has imported libraries forks for each `python -m MODULE`.

`Forks(folder).python` is a program to be called as Python is: what `-m` names runs in a process of its own, with the caller's
working directory, environment, standard streams and `LDM_RESULT_FD`. It dies with its caller.
"""

import array
import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil

LIBRARIES = (
    "torch", "pandas", "pyarrow.pandas_compat", "PIL.ImageCms", "PIL.JpegImagePlugin", "safetensors.torch", "matplotlib.pyplot",
    "transformers.models.bert.modeling_bert", "dvc.cli", "dvc.commands.add", "dvc.repo.plots", "dvc.repo.artifacts",
    "dvc.repo.stage", "dvc.data_cloud", "dvc.cachemgr", "dvc.rwlock", "dvc.scm", "scmrepo.git", "dulwich.worktree",
    "dulwich.ignore", "networkx", "graphviz", "alembic.command", "mlflow.pyfunc", "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "mlflow.store.model_registry.sqlalchemy_workspace_store", "prefect.flow_engine", "prefect.task_engine", "prefect.events",
    "prefect.artifacts", "prefect.utilities.visualization", "anyio._backends._asyncio", "psutil",
)  # fmt: skip
CALLER = """#!{python} -IS
import array, json, os, socket, sys
if sys.argv[1:2] != ["-m"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
files = [0, 1, 2]
if "LDM_RESULT_FD" in os.environ and os.path.exists("/proc/self/fd/" + os.environ["LDM_RESULT_FD"]):
    files.append(int(os.environ["LDM_RESULT_FD"]))
call = json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode()
server.sendmsg([len(call).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
server.sendall(call)
answer = server.recv(4)
sys.exit(int.from_bytes(answer, "big") if answer else 1)
"""


class Forks:
    """The server, as a child of this process."""

    def __init__(self, folder: Path) -> None:
        self.python, address = folder / "bin/python", str(folder / "forks.socket")
        self.python.parent.mkdir(parents=True)
        self.python.write_text(CALLER.format(python=sys.executable, address=address))
        self.python.chmod(0o755)
        self._process = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE)
        while not Path(address).exists():
            assert self._process.poll() is None
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill all that was forked, at once, as the end of a machine would."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def stop(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def serve(address: str) -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{address}.new")
    listening.listen()
    os.rename(f"{address}.new", address)
    callers: dict[int, socket.socket] = {}  # for each process that was forked
    while True:
        for ready in select.select([0, listening, *callers.values()], [], [], 0.005 if callers else None)[0]:
            if ready == 0:  # the owner is gone
                for process in callers:
                    os.killpg(process, signal.SIGKILL)
                return
            if ready is listening:
                caller, _ = listening.accept()
                callers[fork(caller)] = caller
            else:
                for process in [process for process, caller in callers.items() if caller is ready]:  # it is gone
                    os.killpg(process, signal.SIGKILL)
        while callers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            caller = callers.pop(ended[0])
            with contextlib.suppress(OSError), caller:
                caller.sendall((os.waitstatus_to_exitcode(ended[1]) % 256).to_bytes(4, "big"))


def fork(caller: socket.socket) -> int:
    """A child that does what the caller asks for."""
    size, passed, *_ = caller.recvmsg(4, socket.CMSG_SPACE(16))
    files = array.array("i", passed[0][2])
    call = b""
    while len(call) < int.from_bytes(size, "big"):
        call += caller.recv(2**16)
    arguments, folder, variables = json.loads(call)
    child = os.fork()
    if child:
        for file in files:
            os.close(file)
        return child
    code = 1
    try:
        os.setsid()
        for number, file in enumerate(files[:3]):
            os.dup2(file, number)
        if len(files) > 3:
            variables["LDM_RESULT_FD"] = str(files[3])
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        sys.executable = f"{Path(sys.argv[1]).parent}/bin/python"
        sys.argv, sys.path[:1] = arguments, [folder, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, OSError):  # it is closed
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
