"""Remote shards: right bytes over S3, HTTP and files, or one line that says why not; a bounded folder that processes share.

The S3 server is `moto_server`, the widely used re-implementation of the S3 HTTP API: a process of its own on loopback
that speaks real HTTP to the real client and can be killed, and needs no network and no binary beyond a wheel.
"""

import contextlib
import functools
import hashlib
import http.server
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import numpy as np
import pytest
from image_folders import OPTIONS, make_folder, numbered

from ldm.base.errors import InputError
from ldm.base.files import locked
from ldm.data import remote
from ldm.data.batches import Batches
from ldm.data.reader import ShardReader, open_shards
from ldm.data.remote import ShardCache, is_url
from ldm.data.shards import write_shards

FORK = multiprocessing.get_context("fork")
MB = 2**20


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def sha(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def read(cache: ShardCache, name: str, blob: bytes) -> bytes:
    """What the cache gives for the file `name`, which is listed with the hash and size of `blob`."""
    file = cache.open(name, sha(blob), len(blob))
    try:
        return os.pread(file, len(blob) + 1, 0)
    finally:
        os.close(file)


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != remote.LOCKS} if folder.exists() else set()


@contextlib.contextmanager
def refused(*words: str, within: float = 10) -> Iterator[None]:
    """One line of InputError with these words in it, in less than `within` seconds."""
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        yield
    assert time.monotonic() - start < within
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


class Moto:
    """A moto_server process; the system gives it a port, so no other process can hold that."""

    def __init__(self, folder: Path):
        log = folder / f"moto-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        with log.open("w") as stderr:
            self.process = subprocess.Popen(command, stdout=stderr, stderr=stderr)
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.02)
        self.port = int(found[1])
        self.log = log

    def put(self, bucket: str, **blobs: bytes) -> None:
        config = botocore.config.Config(s3={"addressing_style": "path"})
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", config=config)
        client.create_bucket(Bucket=bucket)
        for name, blob in blobs.items():
            client.put_object(Bucket=bucket, Key=name, Body=blob)

    def gets(self, name: str) -> int:
        return len(re.findall(rf"GET /\S*{name} ", self.log.read_text()))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    moto = Moto(tmp_path_factory.mktemp("moto"))
    yield moto
    moto.kill()


@pytest.fixture
def signed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user of S3, without this machine's own settings."""
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"]:
        monkeypatch.delenv(name)
    settings = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    settings |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def moto(started: Moto, signed_in: None, monkeypatch: pytest.MonkeyPatch) -> Moto:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{started.port}")
    return started


class Web:
    """A folder on http://, with a count of what was asked for; `gate`, where set, holds every file back at its middle."""

    def __init__(self, folder: Path):
        self.asked: Counter[tuple[str, str]] = Counter()
        self.gate: threading.Event | None = None
        self.at_gate = threading.Event()
        web = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_request(self, code: Any = "-", size: Any = "-") -> None:
                web.asked[self.command, self.path.rpartition("/")[2]] += 1

            def log_message(self, *_: Any) -> None:
                pass

            def copyfile(self, source: Any, outputfile: Any) -> None:
                blob = source.read()
                with contextlib.suppress(ConnectionError):
                    outputfile.write(blob[: len(blob) // 2])
                    web.at_gate.set()
                    if web.gate:
                        web.gate.wait(20)
                    outputfile.write(blob[len(blob) // 2 :])

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "www").mkdir()
    web = Web(tmp_path / "www")
    yield web
    if web.gate:
        web.gate.set()
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where the cache is to keep its files."""
    return tmp_path / "cache"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same attempts in less time."""
    monkeypatch.setattr(remote, "PAUSES", (0.02, 0.05))
    monkeypatch.setattr(remote, "STALL", 0.4)


def joined(process: Any) -> int:
    process.join(30)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


# what arrives


def test_a_url_has_a_scheme() -> None:
    assert all(map(is_url, ["s3://bucket/x", "https://host/x", "file:///x", "memory://x", "s3a://b"]))
    assert not any(map(is_url, ["x", "/x/y", "data/s3:/x", Path("s3://bucket/x"), "C:/x", "", "./s3://x"]))


def test_bytes_arrive_from_s3_and_stay_when_the_server_has_gone(
    signed_in: None, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto, blob = Moto(tmp_path), noise(20 * MB)  # three requests
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{moto.port}")
        moto.put("arrive", **{"shards/train.tar": blob, "shards/index.json": '{"ä": 1}'.encode()})
        cache = ShardCache("s3://arrive/shards/", disk, 32 * MB)
        assert cache.text("index.json") == '{"ä": 1}'
        with pytest.raises(FileNotFoundError):
            cache.text("prompts.csv")
        assert read(cache, "train.tar", blob) == blob
        assert kept(disk) == {sha(blob)}
    finally:
        moto.kill()
    assert read(cache, "train.tar", blob) == blob
    assert read(pickle.loads(pickle.dumps(cache)), "train.tar", blob) == blob
    with refused("s3://arrive/shards/index.json", "3 attempts"):
        cache.text("index.json")


@pytest.mark.parametrize("name", ["train-00000.tar", "train-a folder, ü-00000.tar", "100%25 #1?.tar"])
def test_bytes_arrive_from_a_web_server_and_a_folder(name: str, web: Web, tmp_path: Path, disk: Path) -> None:
    blob = noise(9 * MB)  # more than one chunk
    (tmp_path / "www" / name).write_bytes(blob)
    (tmp_path / "www/index.json").write_text("{}")
    for number, url in enumerate([web.url, f"file://{tmp_path}/www"]):
        cache = ShardCache(url, disk / str(number), 16 * MB)
        assert cache.text("index.json") == "{}"
        with pytest.raises(FileNotFoundError):
            cache.text("prompts.csv")
        assert read(cache, name, blob) == read(cache, name, blob) == blob
        assert kept(cache.folder) == {sha(blob)}
    assert sum(count for (_, path), count in web.asked.items() if path.endswith(".tar")) == 1


def test_the_descriptor_is_for_reading(web: Web, tmp_path: Path, disk: Path) -> None:
    (tmp_path / "www/a.tar").write_bytes(b"abc")
    for _ in range(2):  # fetched, and kept
        file = ShardCache(web.url, disk, MB).open("a.tar", sha(b"abc"), 3)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(file, b"x")
        os.close(file)


# what does not arrive


class Proxy:
    """A slow TCP proxy that ends the server behind it after `fatal` bytes of answers, and counts them."""

    def __init__(self, moto: Moto, fatal: int):
        self.moto, self.fatal, self.passed = moto, fatal, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener closes
            while True:
                client, _ = self.listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self.moto.port))
                except OSError:
                    client.close()
                    continue
                threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while blob := source.recv(1 << 16):
                sink.sendall(blob)
                if answers:
                    self.passed += len(blob)
                    time.sleep(0.002)
                    if self.passed >= self.fatal:
                        self.moto.process.send_signal(signal.SIGKILL)
                        break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_a_server_killed_in_mid_download_leaves_nothing_and_the_next_one_is_used(
    signed_in: None, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = noise(6 * MB)
    first = Moto(tmp_path)
    proxy = Proxy(first, fatal=2 * MB)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    cache = ShardCache("s3://killed", disk, 8 * MB)
    try:
        first.put("killed", train=blob)
        with refused("s3://killed/train", "3 attempts"):
            read(cache, "train", blob)
        assert first.process.wait(5) == -signal.SIGKILL
        assert 2 * MB <= proxy.passed < len(blob)
        assert kept(disk) == set()
        second = Moto(tmp_path)
        try:
            second.put("killed", train=blob)
            proxy.moto, proxy.fatal = second, 1 << 60
            assert read(cache, "train", blob) == blob
            assert kept(disk) == {sha(blob)}
        finally:
            second.kill()
    finally:
        first.kill()
        proxy.listener.close()


@pytest.mark.parametrize("scheme", ["s3", "http", "file"])
def test_wrong_bytes_are_refused_and_not_kept(
    scheme: str, moto: Moto, web: Web, tmp_path: Path, disk: Path, impatient: None
) -> None:
    url = {"s3": f"s3://wrong-{scheme}", "http": web.url, "file": f"file://{tmp_path}/www"}[scheme]
    cache, blob = ShardCache(url, disk, MB), noise(100_000)
    swapped, short, long = noise(100_000, seed=1), blob[:-1], blob + b"x"
    for found, words in [(swapped, [sha(swapped), sha(blob)]), (short, ["99,999 bytes", "100,000"]), (long, ["over 100,000"])]:
        moto.put(f"wrong-{scheme}", train=found)
        (tmp_path / "www/train").write_bytes(found)
        with refused(f"{url}/train", *words):
            read(cache, "train", blob)
        assert kept(disk) == set()
    moto.put(f"wrong-{scheme}", train=blob)
    (tmp_path / "www/train").write_bytes(blob)
    assert read(cache, "train", blob) == blob


def test_an_error_that_passes_is_not_noticed(web: Web, tmp_path: Path, disk: Path) -> None:
    good, bad = noise(1000), noise(1000, seed=1)
    (tmp_path / "www/train").write_bytes(bad)
    mend = threading.Timer(0.1, (tmp_path / "www/train").write_bytes, [good])
    mend.start()
    assert read(ShardCache(web.url, disk, MB), "train", good) == good
    mend.join()
    assert web.asked["GET", "train"] == 2


def test_absent_files_and_places_are_named(moto: Moto, web: Web, disk: Path) -> None:
    moto.put("present", other=b"")
    for url in ["s3://present", "s3://no-such-bucket", web.url, f"file://{disk}/none", "memory://none"]:
        cache = ShardCache(url, disk, MB)
        with refused(f"{url}/train.tar: not found", within=5):
            read(cache, "train.tar", b"abc")
        with pytest.raises(FileNotFoundError):
            cache.text("index.json")
    assert web.asked["GET", "train.tar"] == 1  # no use to ask again
    assert kept(disk) == set()


def test_a_server_that_does_not_answer_is_given_up(
    signed_in: None, disk: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", host)
        for url in ["s3://silent", host]:
            with refused(f"{url}/train", "3 attempts", "Timeout", within=4):  # 3 x 0.4 s, no product of several retries
                read(ShardCache(url, disk, MB), "train", b"abc")
            with refused(f"{url}/index.json", "3 attempts", "Timeout", within=4):
                ShardCache(url, disk, MB).text("index.json")
    for url in ["s3://silent", host]:  # now nobody listens
        with refused(f"{url}/train", "3 attempts", within=4):
            read(ShardCache(url, disk, MB), "train", b"abc")


def test_missing_credentials_and_unknown_schemes_are_named(moto: Moto, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with refused("s3://private/train", "credentials"):
        read(ShardCache("s3://private", disk, MB), "train", b"abc")
    with refused("s4://bucket/train", "Protocol not known: s4"):
        read(ShardCache("s4://bucket", disk, MB), "train", b"abc")


def test_settings_of_fsspec_are_kept_beside_ours(moto: Moto, disk: Path) -> None:
    moto.put("settings", train=b"abc")
    settings = {
        "FSSPEC_S3": '{"config_kwargs": {"user_agent_extra": "theirs"}}',
        "FSSPEC_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    }
    script = f"""
from pathlib import Path
from ldm.data import remote
remote.ShardCache("s3://settings", Path({str(disk)!r}), 9).open("train", {sha(b"abc")!r}, 3)
config = remote._filesystem("s3://settings", remote.os.getpid())._s3.meta.config
assert (config.read_timeout, config.user_agent_extra) == (remote.STALL, "theirs"), vars(config)
"""
    subprocess.run([sys.executable, "-c", script], env=os.environ | settings, check=True)
    assert kept(disk) == {sha(b"abc")}


@pytest.mark.parametrize(("url", "package"), [("s3://bucket", "s3fs"), ("s3://bucket", "fsspec"), ("http://host", "aiohttp")])
def test_a_missing_package_is_named(url: str, package: str, disk: Path) -> None:
    script = f"""
import sys
sys.modules[{package!r}] = None  # what an import finds where it is not installed
from pathlib import Path
from ldm.data.remote import ShardCache
ShardCache({url!r}, Path({str(disk)!r}), 9).open("train", "0" * 64, 3)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert re.search(rf"InputError: {url}: .*{package}.*pip install ldm-pipeline\[s3\]", result.stderr), result.stderr


def test_a_folder_that_cannot_be_used_is_named(web: Web, tmp_path: Path) -> None:
    (tmp_path / "www/train").write_bytes(b"abc")
    (tmp_path / "file").touch()
    with refused(str(tmp_path / "file"), web.url):
        read(ShardCache(web.url, tmp_path / "file", MB), "train", b"abc")


def test_a_name_from_the_index_does_not_leave_the_folder(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"abc")
    disk.mkdir()
    with refused("memory://x/train", "'../secret'"):
        ShardCache("memory://x", disk, MB).open("train", "../secret", 3)


# the bound


def test_the_folder_holds_the_files_opened_last_and_no_more_than_its_bound(tmp_path: Path, disk: Path) -> None:
    sizes = [30_000, 30_000, 30_000, 30_000, 30_000, 10_000, 20_000, 29_999]
    blobs = {f"{number}.tar": noise(size, number) for number, size in enumerate(sizes)}
    for name, blob in blobs.items():
        (tmp_path / name).write_bytes(blob)
    bound, rng = 90_000, random.Random(0)
    cache, model = ShardCache(f"file://{tmp_path}", disk, bound), OrderedDict[str, int]()  # what an LRU cache would hold
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/notes.txt").write_text("not ours: neither counted nor removed")
    for _ in range(300):
        name = rng.choice(sorted(blobs))
        assert read(cache, name, blobs[name]) == blobs[name]
        digest = sha(blobs[name])
        if digest not in model:
            while sum(model.values()) + len(blobs[name]) > bound:
                model.popitem(last=False)
        model[digest] = len(blobs[name])
        model.move_to_end(digest)
        assert kept(disk) == {*model, "notes.txt"}
        assert sum((disk / digest).stat().st_size for digest in model) <= bound


def test_a_file_larger_than_the_bound_is_refused_at_once(disk: Path) -> None:
    with refused("memory://x/train", "3,000", "2,999", within=0.5):
        read(ShardCache("memory://x", disk, 2999), "train", noise(3000))


def test_an_evicted_file_stays_readable_to_who_has_it_open(tmp_path: Path, disk: Path) -> None:
    blobs = {name: noise(1000, seed) for seed, name in enumerate("ab")}
    for name, blob in blobs.items():
        (tmp_path / name).write_bytes(blob)
    cache = ShardCache(f"file://{tmp_path}", disk, 1500)
    file = cache.open("a", sha(blobs["a"]), 1000)
    assert read(cache, "b", blobs["b"]) == blobs["b"]
    assert kept(disk) == {sha(blobs["b"])}
    assert os.pread(file, 1000, 0) == blobs["a"]
    os.close(file)


def test_a_kept_file_that_was_cut_off_is_fetched_again(web: Web, tmp_path: Path, disk: Path) -> None:
    blob = noise(1000)
    (tmp_path / "www/train").write_bytes(blob)
    cache = ShardCache(web.url, disk, 1500)
    read(cache, "train", blob)
    os.truncate(disk / sha(blob), 999)
    assert read(cache, "train", blob) == blob
    assert web.asked["GET", "train"] == 2


# several processes


def in_child(work: Callable[[], object]) -> Any:
    """A forked child that runs `work` and exits with 0 where that is true."""
    child = FORK.Process(target=lambda: os._exit(0 if work() else 1))
    child.start()
    return child


def test_processes_that_want_the_same_file_fetch_it_once(web: Web, tmp_path: Path, disk: Path) -> None:
    blob = noise(100_000)
    (tmp_path / "www/train").write_bytes(blob)
    cache, together, web.gate = ShardCache(web.url, disk, MB), FORK.Barrier(4), threading.Event()
    children = [in_child(lambda: together.wait() + 1 and read(cache, "train", blob) == blob) for _ in range(3)]
    together.wait()
    assert web.at_gate.wait(20)
    time.sleep(0.3)  # the others are at the same file by now
    web.gate.set()
    assert [joined(child) for child in children] == [0, 0, 0]
    assert web.asked["GET", "train"] == 1
    assert kept(disk) == {sha(blob)}


def test_processes_fetch_different_files_at_once_and_stay_below_the_bound(web: Web, tmp_path: Path, disk: Path) -> None:
    blobs = {f"{number}": noise(50_000, number) for number in range(6)}
    for name, blob in blobs.items():
        (tmp_path / "www" / name).write_bytes(blob)
    cache, web.gate = ShardCache(web.url, disk, 110_000), threading.Event()
    children = [in_child(lambda name=name: read(cache, name, blobs[name]) == blobs[name]) for name in "012"]
    deadline = time.monotonic() + 20
    while sum(web.asked.values()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert sum(web.asked.values()) == 2  # two are under way at the same time, and there is no room for the third
    web.gate.set()
    assert [joined(child) for child in children] == [0, 0, 0]

    def many(seed: int) -> bool:
        order = random.Random(seed)
        return all(read(cache, name, blobs[name]) == blobs[name] for name in order.choices(sorted(blobs), k=40))

    children = [in_child(functools.partial(many, seed)) for seed in range(3)]
    largest = 0
    while any(child.is_alive() for child in children):
        largest = max(largest, listed(disk))
    assert [joined(child) for child in children] == [0, 0, 0]
    assert 50_000 <= largest <= 110_000
    assert all(len(name) == 64 for name in kept(disk))


def listed(folder: Path) -> int:
    """Bytes in the folder at one instant: under the lock in which files grow and get their names."""
    total = 0
    with locked(folder / remote.LOCKS / "folder"):
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def test_what_a_killed_process_left_is_removed(web: Web, tmp_path: Path, disk: Path) -> None:
    blobs = {name: noise(60_000, seed) for seed, name in enumerate("ab")}
    for name, blob in blobs.items():
        (tmp_path / "www" / name).write_bytes(blob)
    cache, web.gate = ShardCache(web.url, disk, 100_000), threading.Event()
    child = in_child(lambda: read(cache, "a", blobs["a"]))
    assert web.at_gate.wait(20)
    deadline = time.monotonic() + 20
    while kept(disk) != {sha(blobs["a"]) + remote.PART} and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    assert joined(child) == -signal.SIGKILL
    assert kept(disk) == {sha(blobs["a"]) + remote.PART}
    web.gate.set()
    assert read(cache, "b", blobs["b"]) == blobs["b"]  # another file: for both there is no room
    assert kept(disk) == {sha(blobs["b"])}
    assert read(cache, "a", blobs["a"]) == blobs["a"]


def test_a_fork_works_and_its_parent_still_does(moto: Moto, web: Web, tmp_path: Path, disk: Path) -> None:
    blobs = {f"{number}": noise(1000, number) for number in range(6)}
    moto.put("forked", **blobs)
    for name, blob in blobs.items():
        (tmp_path / "www" / name).write_bytes(blob)
    for url in ["s3://forked", web.url]:
        cache = ShardCache(url, disk / url[:2], MB)
        assert read(cache, "0", blobs["0"]) == blobs["0"]
        for name in "123":
            assert joined(in_child(lambda cache=cache, name=name: read(cache, name, blobs[name]) == blobs[name])) == 0
        start = time.monotonic()
        assert read(cache, "4", blobs["4"]) == blobs["4"]
        assert time.monotonic() - start < 5  # no attempt was lost with a connection


class Shards:
    """A map-style data set, one item per file."""

    def __init__(self, cache: ShardCache, blobs: dict[str, bytes]):
        self.cache, self.blobs = cache, blobs

    def __len__(self) -> int:
        return len(self.blobs)

    def __getitem__(self, position: int) -> bytes:
        return read(self.cache, str(position), self.blobs[str(position)])


def test_data_loader_workers_read_after_their_parent_has(moto: Moto, disk: Path) -> None:
    from torch.utils.data import DataLoader

    blobs = {f"{number}": noise(10_000, number) for number in range(8)}
    moto.put("loader", **blobs)
    data = Shards(ShardCache("s3://loader", disk, MB), blobs)
    assert data[0] == blobs["0"]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert list(loader) == list(blobs.values())
    assert all(moto.gets(f"loader/{name}") == 1 for name in blobs)


# training from afar


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_s3_are_those_of_the_local_shards_through_a_small_cache(
    workers: int, moto: Moto, tmp_path: Path, disk: Path
) -> None:
    """Shard by shard through a cache that holds a third of them: the same images, each shard fetched once an epoch."""
    make_folder(tmp_path / "source", numbered(120))
    (tmp_path / "source/prompts.csv").write_text("text,label\nan unseen 7,7\n")
    index = write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS)
    bucket = f"epoch{workers}"
    moto.put(bucket, **{f"data/{path.name}": path.read_bytes() for path in (tmp_path / "shards").iterdir()})
    sizes = {shard["name"]: shard["bytes"] for shard in index["shards"]}
    bound = sum(sizes.values()) // 3

    def reader() -> ShardReader:
        return open_shards(f"s3://{bucket}/data", "train", cache=disk, cache_bytes=bound)

    local = open_shards(tmp_path / "shards", "train")
    assert reader().captions_of(range(9)).equals(local.captions_of(range(9)))
    assert reader().prompts.equals(local.prompts) and len(local.prompts) == 1
    before = {name: moto.gets(f"{bucket}/data/{name}") for name in sizes}
    near, far = (Batches(r, 3, shuffle="shard", workers=w) for r, w in ((local, 0), (reader(), workers)))
    last = len(local) // 4 * 4
    for position in range(0, last, 4):
        assert np.array_equal(far.at(position, 4), near.at(position, 4))
        if not workers:  # else files come and go while we look
            assert sum((disk / name).stat().st_size for name in kept(disk)) <= bound
    fetched = {name: moto.gets(f"{bucket}/data/{name}") - before[name] for name in sizes}
    assert workers or set(fetched.values()) == {0, 1}  # each worker reads ahead for itself
    resumed = Batches(reader(), 3, shuffle="shard", workers=workers)  # in the middle, without what came before
    assert np.array_equal(resumed.at(last // 2, 8), near.at(last // 2, 8))


def test_a_damaged_shard_on_s3_is_named_by_the_reader(moto: Moto, tmp_path: Path, disk: Path) -> None:
    make_folder(tmp_path / "source", numbered(40))
    index = write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS)
    name = index["shards"][0]["name"]
    blob = (tmp_path / "shards" / name).read_bytes()
    files = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    moto.put("damaged", **files | {name: blob[:-1] + b"x"})
    reader = open_shards("s3://damaged", "train", cache=disk)
    with refused(f"s3://damaged/{name}", "sha256"):
        reader[0]
    with refused("s3://nobody/index.json", "run the `shard` stage"):
        open_shards("s3://nobody")
