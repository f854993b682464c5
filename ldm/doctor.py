"""Is everything here that a run needs? Each finding says what was found, why it matters and what to type.

`ldm doctor` shows all of them. The same checks precede every run: the first fault ends it, and warnings are shown.
"""

import base64
import contextlib
import http.client
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

from ldm.base import paths
from ldm.base.errors import InputError, disk_full, env_count, env_positive, env_switch, reason
from ldm.config import Settings, load_settings
from ldm.environment import writable
from ldm.registry import locations, tracking, versions
from ldm.versioning.repository import check_data, open_repository, read_yaml

Level = Literal["ok", "warning", "fault"]  # a fault ends a run
Found = Iterator[tuple[Level, str]]
VARIABLES: dict[str, Callable[[str], Any]] = {
    "LDM_STAGE_TIMEOUT": lambda name: env_positive(name, "seconds"),
    "LDM_STAGE_RETRIES": lambda name: env_count(name, 0),
    "LDM_WORKERS": lambda name: env_count(name, 0),
    "LDM_GPUS": lambda name: env_count(name, 0),
    "LDM_PREFECT_PORT": lambda name: env_count(name, 1),
    "LDM_PROCESSES": lambda name: env_count(name, 1),
    "LDM_MICRO_BATCH": lambda name: env_count(name, 0),
    "LDM_GRADIENT_CHECKPOINTING": env_switch,
    "LDM_SHARD_MODEL": env_switch,
    "LDM_SHARD_CACHE_GB": lambda name: env_positive(name, "gigabytes"),
    "LDM_MEMORY_GB": lambda name: env_positive(name, "gigabytes"),
}
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
WRITTEN = (".dvc", ".dvc/tmp", ".dvc/cache", ".ldm", "data", "models", "reports", "mlruns", "mlflow.db", "dvc.lock")
ANSWER_SECONDS = 5
LEAST_FREE = 100 * 10**6  # bytes without which nothing works
COPIES = 6  # of a model: weights, their average, two moments of a checkpoint; DVC's cache and MLflow's store
COUNTED = 100_000  # files at most that are looked at
TORCH = """
import os, torch
from ldm.base.device import default_device
device = default_device()
torch.ones(1, device=device).item()
print(torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {len(os.sched_getaffinity(0))} cores")
"""


class Finding(NamedTuple):
    level: Level
    subject: str
    text: str


def examine(root: Path, *, device: bool = True, data: bool = True) -> Iterator[Finding]:
    """Make the checks, one after the other. Those of the `device` and of the `data` can be left out."""
    tracking.use_default_store(root)
    torch = _start_torch() if device else None  # takes a second or two, meanwhile the others are made
    checks: dict[str, Callable[[], Found]] = {
        "Python": lambda: check_python(root),
        "code": lambda: check_code(root),
        "environment": check_environment,
        "proxy": check_proxy,
        "folders": lambda: check_folders(root),
        "git": lambda: check_git(root),
        "DVC": lambda: check_dvc(root),
        "params.yaml": lambda: check_settings(root),
        "MLflow": lambda: check_mlflow(root),
        "Prefect": check_prefect,
    }
    if data:
        checks["data"] = lambda: check_images(root)
        checks["disk"] = lambda: check_disk(root)
    if torch:
        checks["device"] = lambda: check_device(torch)
    for subject, check in checks.items():
        try:
            for level, text in check():
                yield Finding(level, subject, text)
        except InputError as error:
            yield Finding("fault", subject, str(error))
        except OSError as error:
            yield Finding("fault", subject, f"{error.filename or subject}: {reason(error)}; no run can do without it")
        except Exception as error:  # libraries raise anything for damaged files; the other checks go on
            said = f"{subject} cannot be checked ({type(error).__name__}: {reason(error)}); mend that first"
            yield Finding("fault", subject, str(disk_full(error, root) or said))


def before_run(root: Path, *, data: bool = True) -> list[Finding]:
    """The warnings; `InputError` with the first fault. Torch is asked only about a device that `LDM_DEVICE` names."""
    warnings = []
    for finding in examine(root, device=os.environ.get("LDM_DEVICE", "cpu") != "cpu", data=data):
        if finding.level == "fault":
            raise InputError(finding.text)
        if finding.level == "warning":
            warnings.append(finding)
    return warnings


def check_python(root: Path) -> Found:
    """The libraries, against what pyproject.toml asks for."""
    from packaging.requirements import Requirement

    file = root / "pyproject.toml"
    package = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    wanted = package.get("project", {}).get("dependencies", [])
    wrong = []
    for requirement in map(Requirement, wanted):
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "missing"
        if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, wanted {requirement.specifier or 'any version'}")
    if wrong:
        yield "fault", f"{'; '.join(wrong)}: what runs is not what was tested; `make install`"
    else:
        yield "ok", f"{sys.version.split()[0]}, and {len(wanted)} libraries in the versions that pyproject.toml names"


def check_code(root: Path) -> Found:
    """Which package is imported: a copied project may still use the environment, and so the code, of the original."""
    package, own = Path(__file__).resolve().parent, root / "ldm"
    if own.is_dir() and not own.samefile(package):
        yield (
            "fault",
            f"ldm is imported from {package}, not from {own}: other code would run; `make install`, then activate .venv",
        )
    else:
        yield "ok", f"ldm is imported from {package}"


def check_environment() -> Found:
    """Our variables; see README.md."""
    for name, check in VARIABLES.items():
        check(name)
    place = os.environ.get("LDM_SHARDS", "")
    if place and "://" not in place and not Path(place).is_dir():
        raise InputError(
            f"LDM_SHARDS is {place!r}, and no such folder exists; set it to a folder of shards or a URL, or unset it"
        )
    found = [f"{name}={os.environ[name]}" for name in (*VARIABLES, "LDM_SHARDS", "LDM_DEVICE") if os.environ.get(name)]
    yield "ok", ", ".join(found) or "no variable LDM_… is set"


def check_proxy() -> Found:
    """Python's HTTP libraries refuse a proxy that they cannot use when they start, whatever they then ask for."""
    found = {name: os.environ[name] for known in PROXIES for name in (known, known.lower()) if os.environ.get(name)}
    for name, value in found.items():
        scheme = value.partition("://")[0].lower() if "://" in value else "http"
        if scheme not in ("http", "https", "socks5", "socks5h"):
            raise InputError(f"{name} is {value!r}, which Prefect refuses; set it to http://HOST:PORT, or unset it")
        if scheme.startswith("socks") and not importlib.util.find_spec("socksio"):
            raise InputError(
                f"{name} is {value!r}, for which Prefect needs a package; `uv pip install 'httpx[socks]'`, or unset it"
            )
    yield "ok", f"{', '.join(found)}, not for this machine's own servers" if found else "none"


def check_folders(root: Path) -> Found:
    """Is what a run writes writable?"""
    if unquote(str(root)) != str(root):
        yield (
            "warning",
            f"{root}: MLflow reads % and two digits as one character: `mlflow.pyfunc` cannot load from here; rename it",
        )
    if "?" in str(root):
        raise InputError(f"{root}: MLflow's address of a database cannot hold a question mark; rename the folder")
    for place in (root, *(root / name for name in WRITTEN)):
        if place.exists() and not os.access(place, os.W_OK):
            user, advice = os.getuid(), f"`sudo chown -R {os.getuid()} {root}`"
            raise InputError(f"{place}: not writable for user id {user}, it belongs to {_owner(place)}; {advice}")
    home, temporary = os.path.expanduser("~"), tempfile.gettempdir()  # which is the working directory where there is no other
    if writable(home):
        yield "ok", f"project, home {home} and {temporary} are writable"
    else:
        yield "ok", f"project and {temporary} are writable; home {home} is not, {paths.HOME} stands in"


def check_git(root: Path) -> Found:
    """Versions name the commit that they come from."""
    if shutil.which("git") is None:
        yield "warning", "git is not installed: models will not name the commit that made them; install git"
        return
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    top = next((folder for folder in (root, *root.parents) if (folder / ".git").exists()), None)
    if "dubious ownership" in asked.stderr:
        advice = f"git config --global --add safe.directory {top}"
        yield "warning", f"git refuses {top}, which belongs to {_owner(root)}: models will not name their commit; `{advice}`"
    elif top is None:
        yield "ok", "no repository"  # `check_dvc` says whether that is meant
    elif asked.returncode:
        yield "warning", "no commit yet: models will not name the commit that made them; `git add -A && git commit -m start`"
    else:
        yield "ok", f"commit {asked.stdout.strip()}"


def check_dvc(root: Path) -> Found:
    if not (root / ".dvc").is_dir():
        command = "dvc init" if (root / ".git").exists() else "git init && dvc init"
        raise InputError(f"{root}: no DVC repository, so no stage can run; `{command}` makes one")
    try:
        with open_repository(root) as repo:
            cache, kinds = Path(repo.cache.local.path), repo.cache.local.cache_types
    except InputError as error:
        if "is not a git repository" not in str(error):
            raise
        advice = "`git init` makes one, `dvc config core.no_scm true` goes without"
        raise InputError(f"{root}: DVC needs a git repository, which a downloaded ZIP is not; {advice}") from None
    if not writable(cache):
        raise InputError(f"{cache}: DVC's cache is not writable, so no result can be kept; `dvc cache dir --local FOLDER`")
    yield "ok", f"cache {cache}, by {' or '.join(kinds)}"


def check_settings(root: Path) -> Found:
    data, name = (settings := load_settings(root)).data, settings.registry.name
    yield "ok", f"valid: {data.image_size} pixels, {'RGB' if data.channels == 3 else 'grey'}, registered as {name}"


def check_images(root: Path) -> Found:
    path = load_settings(root).data.path
    folder = root / path
    if folder.exists() and not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"data.path {path}: not readable for user id {os.getuid()}; `sudo chmod -R a+rX {folder}`")
    check_data(root, path)
    if not folder.exists():
        yield "ok", f"{path} is made by a stage"
        return
    count = len(_files(folder))
    yield "ok", f"{path}: {'more than ' if count == COUNTED else ''}{count:,} files"


def check_disk(root: Path) -> Found:
    """Free space against an estimate: shards and latents, twice for DVC's cache, and the models of the last run."""
    model = _size(root / paths.MODEL)  # is put together in a temporary folder to be registered
    for place, about in ((root, _needed(root, load_settings(root))), (Path(tempfile.gettempdir()), model)):
        free = shutil.disk_usage(place).free
        said = f"{_gigabytes(free)} are free, a run from the start needs about {_gigabytes(about)}"
        if free < LEAST_FREE:
            raise InputError(f"{place}: {_gigabytes(free)} are free: nothing can be written; free some space")
        elif free < about:
            yield "warning", f"{place}: {said}; free some space (`dvc gc --workspace` drops old results)"
        elif place == root:
            yield "ok", said


def _needed(root: Path, settings: Settings) -> int:
    data, vae = settings.data, settings.autoencoder
    lock = read_yaml(root / "dvc.lock") if (root / "dvc.lock").is_file() else {}
    entries = (lock.get("stages") or {}).values()
    known = [dep.get("nfiles", 0) for entry in entries for dep in entry.get("deps", ()) if dep["path"] == data.path]
    images = max(known) if any(known) else len(_files(root / data.path))
    pixels = (data.image_size + data.margin) ** 2 * data.channels
    latents = 4 * vae.latent_channels * (data.image_size // vae.factor) ** 2 * (1 + settings.cache_latents.flip)
    models = sum(out.get("size", 0) for entry in entries for out in entry.get("outs", ()) if out["path"].startswith("models/"))
    return 2 * images * (pixels + latents) + COPIES * models + LEAST_FREE


def check_mlflow(root: Path) -> Found:
    uri = os.environ["MLFLOW_TRACKING_URI"]
    database = locations.database_file(uri)
    if database and not database.exists():
        yield "ok", f"{uri}: made by the first run"
        return
    if not database or database.stat().st_size == 0:
        try:
            versions.connect(create=True)
        except versions.Unreachable as error:
            yield (
                "warning",
                f"{error}; a run goes on, {paths.TRACKING} keeps what it records, and a later one delivers it",
            )
            return
    elif not os.access(database, os.W_OK):
        raise InputError(f"{database}: not writable, so nothing can be recorded; `sudo chown {os.getuid()} {database}`")
    name = load_settings(root).registry.name
    champion = versions.by_alias(name, "champion")
    if champion and champion.lost:
        advice = f"bring it back, or `ldm registry promote` another version of {name}"
        yield "warning", f"the files of {champion.uri}, the champion, are gone from {champion.lost}; {advice}"
    else:
        yield "ok", f"{uri}: {f'champion of {name} is version {champion.version}' if champion else f'no champion of {name} yet'}"


def check_prefect() -> Found:
    """The server that `PREFECT_API_URL` names."""
    url, key, login = (os.environ.get(f"PREFECT_API_{name}") for name in ("URL", "KEY", "AUTH_STRING"))
    if not url:
        yield "ok", "each run has a temporary server of its own"
    elif problem := prefect_problem(url, key, login):
        yield "warning", f"{problem}; `ldm run` starts a temporary server instead, a schedule needs this one"
    else:
        yield "ok", f"{url} answers"


def prefect_problem(url: str, key: str | None, login: str | None) -> str | None:
    """Why a Prefect server cannot be used; `InputError` where it refuses the login."""
    headers = {"Content-Type": "application/json"}
    if key or login:
        headers["Authorization"] = f"Bearer {key}" if key else f"Basic {base64.b64encode(str(login).encode()).decode()}"
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/flows/count", b"{}", headers)
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            int(answer.read(100))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            hint = "set PREFECT_API_KEY or PREFECT_API_AUTH_STRING"
            raise InputError(f"PREFECT_API_URL {url}: refuses the login (status {error.code}); {hint}") from None
        return f"PREFECT_API_URL {url}: answers with status {error.code} (a server's address ends with /api)"
    except (OSError, http.client.HTTPException) as error:
        return f"PREFECT_API_URL {url}: does not answer ({reason(error)})"
    except ValueError:
        return f"PREFECT_API_URL {url}: not the address of a Prefect server, such as http://HOST:4200/api"
    return None


def _start_torch() -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", TORCH]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])


def check_device(torch: "subprocess.Popen[str]") -> Found:
    """Where stages compute. Another process asks: here, a context on the GPU would stay for the whole run."""
    out, err = torch.communicate()
    if torch.returncode:
        raise InputError(
            (err.strip() or "torch cannot be imported").splitlines()[-1].removeprefix("ldm.base.errors.InputError: ")
        )
    yield "ok", out.strip()


def _files(folder: Path) -> list[str]:
    """Files below a folder, `COUNTED` at most."""
    return list(islice((name for _, _, names in os.walk(folder) for name in names), COUNTED))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gigabytes(count: int) -> str:
    return f"{count / 10**9:,.1f} GB"


def _owner(path: Path) -> str:
    with contextlib.suppress(KeyError):
        return path.owner()
    return f"user id {path.stat().st_uid}"
