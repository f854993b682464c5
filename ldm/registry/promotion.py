"""Which version is champion: the gate's rules, promotion by hand, rollback."""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from ldm.base.errors import InputError
from ldm.base.paths import BOUNDS, DECISION, SHARDS
from ldm.base.progress import Progress
from ldm.config import load_settings
from ldm.evaluation.gate import Decision, decide
from ldm.registry.versions import BITS, GATE, IMAGE, NO_BOUND, Version, by_alias, connect, load, lookup, tag


def gate_and_promote(root: Path, version: int) -> Decision:
    """Make `version` (the outs in `root`) champion if it beats the champion on the test images; writes decision.html.

    A decision is made once for a champion and level, and a version that was champion does not come back by itself:
    someone, or a better model, replaced it.
    """
    settings = load_settings(root)
    name, level, page = settings.registry.name, settings.registry.level, root / DECISION
    challenger, champion = lookup(f"models:/{name}/{version}"), by_alias(name, "champion")
    earlier = json.loads(challenger.tags.get(GATE, "{}"))
    settled, frame = _settled(challenger, champion, earlier, level), None
    if settled:
        decision = Decision(promote=False, level=level, reason=settled)
        if earlier.get("promote") == ("champion" in challenger.aliases):  # the page of the earlier decision is still right
            with contextlib.suppress(Exception):  # each of MLflow's stores has its own
                connect().download_artifacts(challenger.run_id, page.name, str(page.parent))
                return decision
    elif reason := _not_comparable(challenger, champion):
        reason = f"not comparable: {reason}; `ldm registry promote {version}` decides by hand"
        decision = Decision(promote=False, level=level, reason=reason)
    else:
        frame = compare(root, champion)
        decision = decide(frame["challenger"], frame.get("champion"), level)
    from ldm.report.page import decision_page  # draws with matplotlib

    rival = f"{name} version {champion.version}" if champion else None
    decision_page(page, decision, frame, challenger=f"{name} version {version}", champion=rival)
    if settled:
        return decision

    if challenger.run_id:
        connect().log_artifact(challenger.run_id, str(page))
    record = asdict(decision) | {"champion": champion.version if champion else None, "applied": not decision.promote}
    tag(challenger, GATE, json.dumps(record))  # before the aliases: a kill in between leaves a decision to be applied
    if decision.promote:
        promote(version, name)
        tag(challenger, GATE, json.dumps(record | {"applied": True}))
    return decision


def promote(version: int, name: str = "ldm") -> None:
    """Make a version champion, whatever the gate decided, and the champion so far `previous`."""
    wanted, champion, client = lookup(f"models:/{name}/{version}"), by_alias(name, "champion"), connect()
    if champion and champion.version != version:  # previous first: there is no moment without a champion
        client.set_registered_model_alias(name, "previous", str(champion.version))
    client.set_registered_model_alias(name, "champion", str(wanted.version))


def rollback(name: str = "ldm") -> int:
    """Swap champion and previous; returns the version that is champion now."""
    if (previous := by_alias(name, "previous")) is None:
        raise InputError(f"model {name!r} has no version with the alias 'previous': nothing to roll back to")
    promote(previous.version, name)
    return previous.version


def compare(root: Path, champion: Version | None) -> pd.DataFrame:
    """Lower bounds on log p in nats, a row per test image: columns `challenger`, the model in `root`, and `champion`, if any.

    The champion is measured on the test images in `root` as `evaluate` measures the challenger: the same levels and noise.
    """
    from ldm.base.device import default_device
    from ldm.data.reader import open_shards
    from ldm.evaluation.bounds import image_bounds

    nats = {"challenger": pd.read_csv(root / BOUNDS, dtype={"key": str}).set_index("key")["nats"]}
    if champion is not None:
        settings, samples = load_settings(root), open_shards(root / SHARDS, "test")
        model = load(champion.uri, default_device())
        with Progress("gate: bound of the champion", len(samples)) as progress:
            bounds = image_bounds(model, samples, levels=settings.evaluate.bound_levels, seed=settings.seed, progress=progress)
        nats["champion"] = bounds.set_index("key")["nats"]
    return pd.DataFrame(nats)


def _settled(challenger: Version, champion: Version | None, earlier: dict[str, Any], level: float) -> str | None:
    """Why there is no new decision about the challenger after the `earlier` one; None if one is due."""
    if champion is None:
        return None
    if champion.version == challenger.version:
        return f"version {challenger.version} is the champion already"
    if not earlier.get("applied"):
        return None
    if earlier["promote"]:
        back = f"`ldm registry promote {challenger.version}` brings it back"
        return f"version {challenger.version} was champion before version {champion.version}; {back}"
    if (earlier["champion"], earlier["level"]) == (champion.version, level):
        return f"decided before against version {champion.version}: {earlier['reason']}"
    return None


def _not_comparable(challenger: Version, champion: Version | None) -> str | None:
    for version in filter(None, (challenger, champion)):
        if version.tags.get(BITS) == NO_BOUND:
            return f"version {version.version} has a VQ autoencoder, and so no bound on log p(x)"
    if champion is None:
        return None
    ours, theirs = challenger.tags.get(IMAGE), champion.tags.get(IMAGE)
    if ours != theirs:
        return f"its images are {ours}, those of champion version {champion.version} are {theirs}"
    test, held_out = (json.loads(found.tags["ldm.evaluation"]) for found in (challenger, champion))
    if test["test_fraction"] > held_out["test_fraction"] + held_out["val_fraction"]:
        return f"champion version {champion.version} was trained on some of its test images"
    return None
