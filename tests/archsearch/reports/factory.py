"""Studies with made-up but realistic scores, in the form in which a search stores them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from PIL import Image, ImageDraw

from archsearch.block_latency.config import BlockTableConfig
from archsearch.block_latency.fitting import fit_block_table
from archsearch.block_latency.table import BlockTable
from archsearch.protocol import EvaluationProtocol
from archsearch.score import Cost, LatencyRecord, Quality, Score
from archsearch.spaces.loading import load_space
from archsearch.spaces.space import Space
from archsearch.stats.estimate import Estimate
from archsearch.studies.storage.rounds import BlockImportance, EvolutionRound
from snapgen.architecture import block_index
from snapgen.architecture.schema import Architecture
from tests.records import latency_record

PROTOCOL: dict[str, Any] = {
    "protocol": {
        "data": "emoji",
        "resolution": 32,
        "steps": 300,
        "batch_size": 64,
        "train_seeds": [0, 1],
        "feature_extractor": "e",
    },
    "data_digest": "6c1f3b0d2a9e4877",
    "revision": 1,
}
HASH = "2f7d9a10c4be5386"
MACHINE = {"system": "Linux-6.8-x86_64", "processor": "Xeon", "cores": 2, "device": "cpu"}
OBJECTIVE_NAMES = ("validation_loss", "latency_ms")
INFEASIBLE_MS = 9.0


def create(
    folder: Path,
    *,
    name: str = "emoji",
    candidates: int = 36,
    objectives: Sequence[str] = OBJECTIVE_NAMES,
    samples: bool = True,
    names: Mapping[int, str] | None = None,
    seed: int = 0,
    storage: str | None = None,
    adapt: Callable[[Quality], Quality] = lambda quality: quality,
) -> optuna.Study:
    """A study of base, reference and random candidates of the shipped space, some of them too slow.

    It is in memory unless ``storage`` is given; artifacts are in ``folder``. ``adapt`` changes every quality.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = load_space("emoji")
    study = optuna.create_study(study_name=name, storage=storage, directions=["minimize"] * len(objectives))
    settings: dict[str, Any] = {
        "name": name,
        "space": "emoji",
        "objectives": list(objectives),
        "constraints": {"latency_ms": INFEASIBLE_MS},
    }
    settings |= {"seed": 0, "sampler": {"name": "gp"}, "trials": candidates, "latency": {"device": "host"}}
    attrs = {"settings": settings, "space": space.to_dict(), "protocol": PROTOCOL, "protocol_hash": HASH}
    attrs |= {"machine": MACHINE, "artifacts": str(folder / "artifacts")}
    for key, value in attrs.items():
        study.set_user_attr(key, value)
    rng = random.Random(seed)
    designs = list(space.reference_points().items()) if candidates > 1 else []
    while len(designs) < candidates:
        designs.append(("", space.sample(rng)))
    for slot, (design, point) in enumerate(designs):
        display_name = (names or {}).get(slot, design)
        score = made_up(space.architecture(point), random.Random(slot + 100 * seed))
        if score.quality:
            score = score.model_copy(update={"quality": adapt(score.quality)})
        picture = folder / "samples.png"
        grid(random.Random(slot)).save(picture)
        files = [picture] if samples and score.quality else []
        add(study, space, slot, point, score, name=display_name or None, files=files)
    return study


RESOLVED = {
    "protocol": EvaluationProtocol(steps=900, batch_size=64, train_seeds=(0,)).model_dump(mode="json"),
    "data_digest": "6c1f3b0d2a9e4877",
    "autoencoder_digest": "11",
    "text_encoder_digest": "22",
    "feature_extractor_digest": "33",
    "revision": 1,
}
TARGET_MS = 8.0


def blocks_study(name: str, settings: Mapping[str, Any], protocol: Mapping[str, Any] = RESOLVED) -> optuna.Study:
    """Study of the shipped space of blocks, without trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=name, directions=["minimize", "minimize"])
    all_settings = {
        "name": name,
        "space": "emoji-blocks",
        "objectives": list(OBJECTIVE_NAMES),
        "constraints": {},
        **settings,
    }
    space = load_space("emoji-blocks").to_dict()
    attrs = {"settings": all_settings, "space": space, "protocol": protocol, "protocol_hash": HASH, "machine": MACHINE}
    for key, value in attrs.items():
        study.set_user_attr(key, value)
    return study


class Clock:
    """Latency backend that derives the latency of a network from its MACs."""

    def measure(self, arch: Architecture, latent_size: int, context_tokens: int) -> LatencyRecord:  # noqa: ARG002
        return latency_record(milliseconds_of(arch))


def milliseconds_of(arch: Architecture) -> float:
    """Latency that `Clock` reports: not exactly a sum over blocks."""
    return float(0.4 + 1.1 * (counted(arch)[1] / 1e6) ** 0.9)


def evolved(folder: Path, *, rounds: int = 9, metric: str = "validation_loss") -> optuna.Study:
    """Evolution with made-up numbers: robust training, removals, two copies, final training."""
    how = {"target_ms": TARGET_MS, "round_steps": 120, "final_steps": 300, "metric": metric}
    study = blocks_study("evolution/emoji", {"evolve": how})
    study.set_user_attr("artifacts", str(folder / "artifacts"))
    space = load_space("emoji-blocks")
    table = fit_block_table(
        Clock(), space.base, 8, 16, BlockTableConfig(min_repeats=1, max_repeats=1, validation_nets=8)
    )
    study.set_user_attr("block_table", table.model_dump(mode="json"))
    arch, parent, spent = space.base, None, 0.0
    removed: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    for number in range(rounds):
        arch = block_index.edit_blocks(arch, removed, copied)
        last = number == rounds - 1
        spent += 3 * counted(arch)[1] * 64 * (900 if number == 0 else 120)
        worths = () if last else worths_of(arch, table, random.Random(number))
        names = [w.block for w in sorted(worths, key=lambda w: w.value)]
        copying = table.predict(arch) < TARGET_MS and not last
        quality = made_up_quality(arch, random.Random(number))
        found = EvolutionRound(
            number=number,
            phase="robust" if number == 0 else "final" if last else "evolve",
            parent=parent,
            removed=removed,
            copied=copied,
            metric=metric,
            quality=quality.validation_loss,
            predicted_ms=table.predict(arch),
            steps=900 if number == 0 else 120,
            training_macs=spent,
            worths=worths,
            next="ended at the target" if last else "copy the most worthy" if copying else "remove the least worthy",
        )
        add_round(study, space, number, arch, found, quality)
        parent = number
        removed, copied = (), ()
        if number < rounds - 2:
            every = block_index.blocks(arch)
            once = [
                b.name for b in block_index.removable(arch) if [o.block_site for o in every].count(b.block_site) == 1
            ]
            best = [name for name in reversed(names) if name in once][:2]
            removed, copied = ((), tuple(best)) if copying else (tuple(names[:3]), ())
    return study


def add_round(
    study: optuna.Study, space: Space, slot: int, arch: Architecture, found: EvolutionRound, quality: Quality
) -> None:
    """Add one round as a trial."""
    ms = milliseconds_of(arch) * random.Random(slot).uniform(0.97, 1.04)
    record = latency_record(ms, lower_quartile_ms=ms * 0.985, upper_quartile_ms=ms * 1.03)
    params, macs = counted(arch)
    cost = Cost(params=int(params), macs=int(macs), activation_bytes=90_000)
    count = Counter(f"{b.site}.layers[{b.layer}].{block_index.FIELDS[b.kind]}" for b in block_index.blocks(arch))
    point = {knob.name: count[knob.name] for knob in space.knobs}
    score = Score(cost=cost, latency=record, quality=quality)
    add(study, space, slot, point, score, evolution=found.model_dump(mode="json"))


def worths_of(arch: Architecture, table: BlockTable, rng: random.Random) -> tuple[BlockImportance, ...]:
    """Made-up importance of every removable block; transformers at the highest resolution are least important."""
    found = []
    for block in block_index.removable(arch):
        loss = 0.02 * rng.gauss(0.5, 0.5) + (0.03 if block.kind == "residual" else 0.05 * ("[0]" not in block.site))
        estimate_of = Estimate(value=loss, low=loss - 0.006, high=loss + 0.006)
        place = {"site": block.site, "layer": block.layer, "kind": block.kind, "index": block.index}
        found.append(
            BlockImportance(block=block.name, label=block.label, loss=estimate_of, ms=table.block_ms(block), **place)
        )
    return tuple(found)


def made_up_quality(arch: Architecture, rng: random.Random) -> Quality:
    """Made-up quality: better with more parameters, plus noise."""
    loss = 0.36 + 0.1 / (counted(arch)[0] / 1e5) + rng.gauss(0, 0.002)
    only = Estimate(value=loss, low=loss - 0.01, high=loss + 0.01, by_seed=(loss,))
    return Quality(validation_loss=only, extractor="e", protocol_hash=HASH, training_seconds=9.0)


def sampled(*, candidates: int = 14, protocol: Mapping[str, Any] = RESOLVED) -> optuna.Study:
    """Search of the space of blocks by a sampler."""
    study = blocks_study("emoji_blocks", {"trials": candidates, "sampler": {"name": "gp"}}, protocol)
    space, rng = load_space("emoji-blocks"), random.Random(5)
    for slot in range(candidates):
        point = dict(space.base_point) if slot == 0 else space.sample(rng)
        arch = space.architecture(point)
        params, macs = counted(arch)
        cost = Cost(params=int(params), macs=int(macs), activation_bytes=90_000)
        score = Score(cost=cost, latency=latency_record(milliseconds_of(arch)), quality=made_up_quality(arch, rng))
        add(study, space, slot, point, score, name="base" if slot == 0 else None)
    return study


def add(
    study: optuna.Study,
    space: Space,
    slot: int,
    point: Mapping[str, int],
    score: Score | None,
    *,
    name: str | None = None,
    state: str = "",
    files: Sequence[Path] = (),
    **attrs: Any,
) -> None:
    """Add one trial with its artifacts as a worker stores it; ``state`` is derived from the score by default."""
    from optuna.trial import TrialState

    arch = space.architecture(point)
    known = {"worker": {"host": "here", "pid": 1}, "slot": slot, "name": name, "stage": "done", "fraction": 1.0}
    known |= {"architecture": arch.model_dump(mode="json"), "architecture_id": arch.id, "reused_from": None}
    attrs = {**known, **attrs}
    values = None
    if score is not None:
        attrs["score"] = score.model_dump(mode="json")
        state = state or ("COMPLETE" if score.quality else "PRUNED")
        if state == "PRUNED" and score.latency:
            attrs["infeasible"] = f"latency_ms {score.latency.median_ms:.3g} > {INFEASIBLE_MS:g}"
        if state == "COMPLETE":
            values = [score.value(o) for o in study.user_attrs["settings"]["objectives"]]
            attrs["values"] = values
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        k.name: optuna.distributions.IntDistribution(0, len(k.choices) - 1)
        if k.ordered
        else optuna.distributions.CategoricalDistribution(list(range(len(k.choices))))
        for k in space.knobs
    }
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.RUNNING, params=dict(point), distributions=distributions, user_attrs=attrs
        )
    )
    trial = study.get_trials(deepcopy=False)[-1]
    for file in files:
        store = Path(study.user_attrs["artifacts"])
        store.mkdir(exist_ok=True)
        optuna.artifacts.upload_artifact(
            artifact_store=optuna.artifacts.FileSystemArtifactStore(str(store)),
            file_path=str(file),
            study_or_trial=trial,
            storage=study._storage,
        )
    study._storage.set_trial_state_values(trial._trial_id, TrialState[state], values)


def made_up(arch: Architecture, rng: random.Random) -> Score:
    """Made-up score that depends on the architecture, with noise; candidates that are too slow are not trained."""
    params, macs = counted(arch)
    milliseconds = 0.4 + 1.2 * macs / 1e6 * rng.uniform(0.97, 1.03)
    quartiles = {"lower_quartile_ms": milliseconds * 0.98, "upper_quartile_ms": milliseconds * 1.04}
    latency = latency_record(milliseconds, **quartiles, runs=120, chip="Xeon", runtime="onnxruntime 1.25")
    cost = Cost(params=int(params), macs=int(macs), activation_bytes=int(9e4 + 0.01 * macs))
    if milliseconds > INFEASIBLE_MS:
        return Score(cost=cost, latency=latency)
    better = 0.012 * arch.rope + 0.02 * arch.qk_norm - 0.015 * (arch.mid.conv == "separable")
    loss = 0.37 + 0.16 / (params / 1e6 + 0.4) - better
    seeds = [loss + rng.gauss(0, 0.004) for _ in range(2)]
    quality = Quality(
        validation_loss=estimate(seeds, 0.006),
        frechet_distance=estimate([760 + 900 * (s - 0.4) + rng.gauss(0, 14) for s in seeds], 24),
        kernel_distance=estimate([0.02 + 0.3 * (s - 0.4) + rng.gauss(0, 0.006) for s in seeds], 0.008),
        extractor="efficientnet-lite0",
        protocol_hash=HASH,
        training_seconds=35 + milliseconds,
    )
    return Score(cost=cost, latency=latency, quality=quality)


def estimate(seeds: Sequence[float], half: float) -> Estimate:
    """Mean of the seeds with an interval of the given half-width."""
    value = float(np.mean(seeds))
    return Estimate(value=value, low=value - half, high=value + half, by_seed=tuple(seeds))


def counted(arch: Architecture) -> tuple[float, float]:
    """Approximate number of parameters and MACs."""
    params = macs = 0.0
    for place, blocks, channels in arch.named_levels():
        area = 4 ** (len(arch.down) - 1 - (int(place[-2]) if place != "mid" else len(arch.down) - 1))
        width = channels * channels
        conv = 18 if blocks.conv == "standard" else 2 + 2 * blocks.expansion
        transformer = 3 * blocks.ffn_ratio + 4 + 4 * blocks.self_attention
        size = width * (blocks.num_res_blocks * conv + blocks.num_transformers * blocks.transformer_depth * transformer)
        params, macs = params + size, macs + size * area * 4
    return params, macs


def grid(rng: random.Random) -> Image.Image:
    """Grid of four by eight drawn faces of 32 px."""
    image = Image.new("RGB", (8 * 32, 4 * 32), "white")
    draw = ImageDraw.Draw(image)
    for x in range(0, image.width, 32):
        for y in range(0, image.height, 32):
            hue = tuple(rng.randrange(90, 255) for _ in range(3))
            draw.ellipse((x + 3, y + 3, x + 28, y + 28), fill=hue)
            draw.ellipse((x + 9, y + 10, x + 12, y + 14), fill="#333")
            draw.ellipse((x + 19, y + 10, x + 22, y + 14), fill="#333")
            draw.arc((x + 9, y + 12, x + 22, y + 23), 20, 160, fill="#333", width=2)
    return image
