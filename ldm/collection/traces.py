"""What DVC has of images: their files, the shards that hold them, and the latents of these shards."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from ldm.collection.objects import DIGEST, Objects
from ldm.data.images import SUFFIXES
from ldm.data.latents import CAPTIONS

Kind = dict[str, set[str]]  # for each object, by its md5, the digests of the images that it holds or was made of


@dataclass
class Traces:
    """Of the images that are asked for."""

    digests: dict[str, set[str]]  # of each image, whatever it is called
    named: Kind  # as the others, by a name under which shards or folders hold images
    images: Kind = field(default_factory=dict)
    shards: Kind = field(default_factory=dict)
    latents: Kind = field(default_factory=dict)
    captions: Kind = field(default_factory=dict)  # files with their captions, which other images may have as well
    shard_hashes: Kind = field(default_factory=dict)  # as `shards`, by sha256
    refused: dict[str, str] = field(default_factory=dict)  # image -> why nothing of it is deleted

    @property
    def names(self) -> set[str]:
        """Of what is not refused."""
        wanted = self.wanted
        return {name for name, digests in self.named.items() if digests & wanted}

    @property
    def wanted(self) -> set[str]:
        """The digests of what is not refused."""
        return {digest for image, digests in self.digests.items() if image not in self.refused for digest in digests}


def is_name(image: str) -> bool:
    """Whether an image is called by its name, not by a hash."""
    return not re.fullmatch("[0-9a-f]{64}|[0-9a-f]{32}", image)


def find_traces(objects: Objects, images: Collection[str]) -> Traces:
    """All traces of images, each called by its `file_name`, its sha256 or its md5."""
    samples = [(md5, key[:DIGEST], name) for md5, found in objects.samples().items() for key, name in found.items()]
    named = defaultdict[str, set[str]](set)
    for _, digest, name in samples:
        named[name].add(digest)
    files = {image for image in images if len(image) == 32 and not is_name(image) and image in objects.places}
    digests = {image: named[image] if is_name(image) else {image[:DIGEST]} for image in images}
    digests |= {md5: {objects.sha256(md5)[:DIGEST]} for md5 in files}
    traces = Traces(digests, {path: set(digests[md5]) for path, md5 in objects.files if md5 in files})
    wanted = traces.wanted
    for md5, digest, name in samples:
        if digest in wanted:
            traces.shards.setdefault(md5, set()).add(digest)
            traces.named.setdefault(name, set()).add(digest)
    unnamed = wanted - {digest for _, digest, _ in samples} - {digest for md5 in files for digest in digests[md5]}
    for md5 in files | _candidates(objects, set(traces.named), everything=bool(unnamed)):
        if found := objects.digests(md5) & wanted:
            traces.images[md5] = found
    traces.shard_hashes = {objects.sha256(md5): found for md5, found in traces.shards.items()}
    for folder in objects.folders:  # latents of every autoencoder
        for file in objects.json(folder.get("manifest.json", "")).get("files", []):
            if made := traces.shard_hashes.get(file.get("shard_sha256")):
                kind = traces.captions if file.get("split") == CAPTIONS else traces.latents
                kind[folder[file["name"]]] = made
    return traces


def captions(objects: Objects, names: set[str]) -> set[str]:
    """The md5 of files beside images of these names that are called like them but for the suffix: captions in own files."""
    found = set()
    for folder in objects.folders:
        others = {path for path in folder if PurePosixPath(path).suffix.lower() not in SUFFIXES}
        stems = {path.rpartition(".")[0] for path in folder.keys() - others if not names.isdisjoint(_ends(path))}
        found |= {folder[path] for path in others if path.rpartition(".")[0] in stems}
    return found & objects.places.keys()


def _candidates(objects: Objects, names: set[str], everything: bool) -> set[str]:
    """The md5 of files of these names. Equal files have one md5, so one name leads to all copies; or of every image."""
    if everything:
        return {md5 for path, md5 in objects.files if PurePosixPath(path).suffix.lower() in SUFFIXES}
    paths = names | {name[: name.index(".tar/") + 4] for name in names if ".tar/" in name}
    return {md5 for path, md5 in objects.files if not paths.isdisjoint(_ends(path))}


def _ends(path: str) -> Iterator[str]:
    """A path, and what is left of it without its first folders."""
    yield path
    while "/" in path:
        path = path.partition("/")[2]
        yield path
