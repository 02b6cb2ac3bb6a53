"""Commands on latency: latency, and serve-device, which measures for searches elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archsearch.cli.options import ARCHITECTURE, DEVICES, ContextTokens, Device, Json, LatentSize, Quiet
from archsearch.cli.output import print_json, print_table, progress_bar

if TYPE_CHECKING:
    from archsearch.latency.compute_plan import PlacedOp
    from archsearch.predictor.model import LatencyModel, LatencyPrediction
    from archsearch.score import LatencyRecord


app = typer.Typer()


@app.command(
    "serve-device",
    epilog="Example: archsearch serve-device --storage postgresql+psycopg://me@db/st --device iphone",
)
def serve_device(
    storage: Annotated[str, typer.Option(help="Where the searches are: their Optuna URL.")],
    device: Annotated[str, typer.Option(help="What to measure on: host, coreml, coreai or iphone.")] = "host",
    device_option: Annotated[
        list[str] | None, typer.Option(help="A setting of the device, KEY=VALUE; may be given again.")
    ] = None,
    idle_timeout: Annotated[
        float | None, typer.Option(min=0, help="End after so many seconds without work; default: never.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure what searches wait for (latency: remote: true), until interrupted. Several may serve one storage."""
    from archsearch.studies.remote.server import serve
    from snapgen.config import parse_yaml
    from snapgen.errors import InputError

    options = {}
    for text in device_option or []:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError("--device-option", f"{text!r:.60} sets nothing", "write KEY=VALUE")
        options[key] = parse_yaml(value, "--device-option")
    log: Callable[[str], None] = (lambda _: None) if quiet else typer.echo
    made = serve(storage, device, options, log=log, idle_seconds=idle_timeout)
    typer.echo(f"{made} measurements made")


latency_app = typer.Typer(
    help="Time a net, or predict its time; fit a prediction, and see how far to trust it.",
    no_args_is_help=True,
    epilog="Example: archsearch latency measure snapgen-t2i --device predicted:iphone-16-pro-max",
)
app.add_typer(latency_app, name="latency")

COSTLIEST = 30
"""Operations that are printed; the JSON has all of them."""


@latency_app.command(epilog="Example: archsearch latency measure tiny-decoder --device predicted:iphone-16-pro-max")
def measure(
    net: Annotated[str, typer.Argument(help=f"{ARCHITECTURE}, or tiny-decoder.")],
    device: Device = None,
    latent_size: LatentSize = None,
    context_tokens: ContextTokens = None,
    as_json: Json = False,
) -> None:
    """Time one forward pass of a net, or predict it; a study's candidate as the study did, but for the options."""
    from archsearch.cost.operations import operations as operations_of
    from archsearch.latency.coreml import AppleBackend
    from archsearch.predictor.backend import PredictedBackend
    from archsearch.predictor.reference_nets import ReferenceNet
    from archsearch.studies.lookup import find_architecture, find_conditions
    from snapgen.architecture.presets import TINY_DECODER
    from snapgen.errors import InputError

    conditions = find_conditions(net).with_overrides(
        latent_size=latent_size, context_tokens=context_tokens, device=device
    )
    latent, tokens, timer = conditions.latent_size, conditions.context_tokens, conditions.backend()
    operations: tuple[PlacedOp, ...] = ()
    arch = None if net == TINY_DECODER else find_architecture(net, other_names=(TINY_DECODER,))
    if isinstance(timer, PredictedBackend):
        decoder = ReferenceNet(name=TINY_DECODER, latent=latent)
        passed = operations_of(arch, latent, context_tokens=tokens) if arch else decoder.operations()
        prediction, model = timer.model.predict(passed), timer.model
        record = model.record(prediction)
    else:
        if arch is None:
            problem = f"can not be timed on {conditions.device}"
            raise InputError(net, problem, "predict it: --device predicted:iphone-16-pro-max")
        prediction, model = None, None
        with told_in_a_line(conditions.device):
            if isinstance(timer, AppleBackend):
                record, operations = timer.detailed(arch, latent, tokens)
            else:
                record = timer.measure(arch, latent, tokens)
    size = {"latent_size": latent} | ({"context_tokens": tokens} if arch else {})
    if as_json:
        shares = {"share_ms": prediction.shares} if prediction else {}
        published = {"published": [r.model_dump() for r in model.residuals]} if model and model.residuals else {}
        placed = {"operations": [op.estimate(record.median_ms) for op in operations]} if operations else {}
        print_json({**record.model_dump(mode="json"), **size, **shares, **published, **placed})
        return
    _print_record(net, record)
    given = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in size.items())
    typer.echo(f"One pass of {'the U-Net' if arch else net} at batch size 1, {given}")
    if prediction and model:
        _print_shares(prediction)
        _print_residuals(model)
    _print_operations(record, operations)


@latency_app.command(epilog="Example: archsearch latency sample emoji --num 25 --out records.jsonl    Resumes.")
def sample(
    space: Annotated[str, typer.Argument(help="A shipped space (emoji, emoji-large, snapgen) or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The file of JSON lines; what it has is not measured again.")],
    num: Annotated[int, typer.Option(min=1, help="Number of random architectures, within the space's limits.")] = 25,
    seed: Annotated[int, typer.Option(min=0, help="Which ones: 25 of a seed are the first of its 40.")] = 0,
    min_repeats: Annotated[int, typer.Option(min=2, help="Measure each at least so often.")] = 3,
    max_repeats: Annotated[int, typer.Option(min=2, help="Until its two lowest agree, but at most so often.")] = 8,
    device: Annotated[str, typer.Option(help=f"{DEVICES}.")] = "host",
    wait_until_idle: Annotated[bool, typer.Option(help="Before each, wait until this machine is idle.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure random architectures of a space into a file, to fit or to validate a prediction."""
    from archsearch.devices import backend
    from archsearch.latency import repeats
    from archsearch.latency.records import SampleFile, ensure_writable
    from archsearch.spaces.loading import load_space

    wanted = load_space(space)
    ensure_writable(out)
    archs = repeats.sample_architectures(wanted, num, seed=seed)
    timer, file = backend(device), SampleFile(out, wanted.latent_size, wanted.context_tokens)
    known = file.records()
    with progress_bar("measuring", quiet=quiet) as progress, told_in_a_line(device):
        repeats.measure_round_robin(
            lambda arch: timer.measure(arch, file.latent_size, file.context_tokens),
            archs,
            known,
            save=file.append,
            min_repeats=min_repeats,
            max_repeats=max_repeats,
            ready=repeats.wait_until_idle if wait_until_idle else lambda: None,
            failed=lambda _, why: typer.echo(why, err=True),
            progress=progress,
        )
    measured = [len(known[arch_id]) for arch_id in {arch.id for arch in archs} if known[arch_id]]
    typer.echo(f"{out}: {sum(measured)} records of {len(measured)} of the {num} architectures")


@latency_app.command(epilog="Example: archsearch latency fit records.jsonl --out my-phone.json")
def fit(
    records: Annotated[str | None, typer.Argument(help="A file of latency sample, or a study.")] = None,
    profile: Annotated[str | None, typer.Option(help="A shipped profile, to its published figures instead.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the model to this JSON file.")] = None,
) -> None:
    """Fit a model of a device, to records of it or to figures published of it."""
    from archsearch.predictor import profiles
    from archsearch.predictor.model import fit_latency_model
    from archsearch.predictor.profile_fitting import fit_profile
    from archsearch.studies.experiments.latency_validation import load_records
    from snapgen.errors import InputError
    from snapgen.io.atomic import atomic_write_text

    if (records is None) == (profile is None):
        raise InputError("latency fit", "needs records or --profile", "give one of the two")
    if profile is not None and profile not in profiles.NAMES:
        raise InputError("--profile", f"no profile is called {profile!r:.60}", f"use {', '.join(profiles.NAMES)}")
    if profile is None:
        assert records is not None
        model = fit_latency_model(load_records(records), source=records)
    else:
        model = fit_profile(profile)
    if out:
        atomic_write_text(out, model.to_json())
    if model.fitted_to:
        typer.echo(f"{model.device}, {model.chip}: fitted to {len(model.fitted_to)} nets")
    coefficients = [(name, f"{ms:.4g}") for name, ms in model.coefficients.items()]
    print_table("Milliseconds for one", ("", "ms"), coefficients)
    _print_residuals(model)
    if out:
        typer.echo(f"Model: {out}; use it as --device predicted:{out}")


@latency_app.command(epilog="Example: archsearch latency validate my-phone.json other-records.jsonl")
def validate(
    model: Annotated[str, typer.Argument(help="A file of latency fit, or a profile's name.")],
    records: Annotated[str, typer.Argument(help="A file of latency sample, or a study.")],
    as_json: Json = False,
) -> None:
    """Hold a model to records of nets that it was not fitted to, beside MACs alone and params alone."""
    from archsearch.predictor.backend import load_latency_model
    from archsearch.predictor.model import COVERAGE
    from archsearch.studies.experiments.latency_validation import load_records, validate_model

    found = validate_model(load_latency_model(model.removeprefix("predicted:")), load_records(records), source=records)
    if as_json:
        values = asdict(found)
        for row in values["rows"]:
            if rho := row["spearman"]:
                row["spearman"] = {"rho": rho.value, "low": rho.low, "high": rho.high}
        print_json(values)
        return
    header = ("", "Spearman", "95 %", "Kendall", "within ±5 %", "±10 %", "in interval")
    cells = []
    for row in found.rows:
        rho = row.spearman
        ranks = (f"{rho.value:.3f}", f"{rho.low:.3f}–{rho.high:.3f}") if rho else ("–", "–")
        coverage = "–" if row.coverage is None else f"{row.coverage:.1%}"
        cells.append((row.name, *ranks, f"{row.kendall:.3f}", f"{row.within_5:.1%}", f"{row.within_10:.1%}", coverage))
    left = f" ({found.excluded} it was fitted to left out)" if found.excluded else ""
    print_table(f"{found.nets} nets{left}", header, cells)
    typer.echo(f"The interval is meant to hold {COVERAGE:.0%}; its upper end is {found.interval:+.0%}, in the median.")


@latency_app.command(epilog="Example: archsearch latency figures --profile iphone-15-pro")
def figures(
    profile: Annotated[str, typer.Option(help="The shipped profile to hold to them.")] = "iphone-16-pro-max",
    as_json: Json = False,
) -> None:
    """Published figures of Apple devices that no profile is fitted to, and what fitting to them would be worth."""
    from archsearch.predictor import figures as apple, profiles
    from snapgen.errors import InputError

    if profile not in profiles.NAMES:
        raise InputError("--profile", f"no profile is called {profile!r:.60}", f"use {', '.join(profiles.NAMES)}")
    known, held = apple.figures(), apple.held_out(profile)
    if as_json:
        print_json({"figures": [f.model_dump(mode="json") for f in known], "held_out": [asdict(h) for h in held]})
        return
    rows = [(f.what, f.tag, f.device, f.units, f.runtime, f"{f.ms:g}", f.source) for f in known]
    print_table("As published", ("", "tag", "device", "on", "runtime", "ms", "source"), rows)
    errors = [(h.predicted_ms / h.published_ms, h.refitted_ms / h.published_ms) for h in held]
    cells = [
        (h.what, h.device, f"{h.published_ms:.4g}", f"× {shipped:.2f}", f"× {refitted:.2f}")
        for h, (shipped, refitted) in zip(held, errors, strict=True)
    ]
    print_table(f"Held out of {profile}: prediction over published", ("", "of", "ms", "shipped", "refitted"), cells)
    shipped, refitted = (apple.mean_error(list(ratios)) for ratios in zip(*errors, strict=True))
    typer.echo(
        f"Refitted: to the others too, with a tolerance of {apple.OTHER_CHIP:.0%}. Mean factor missed by: "
        f"shipped {shipped:.2f}, refitted {refitted:.2f}."
    )


@latency_app.command(epilog="Example: archsearch latency verify records.jsonl more.jsonl")
def verify(
    records: Annotated[list[str], typer.Argument(help="Files of latency sample, or studies.")],
    as_json: Json = False,
) -> None:
    """Say whether records share their machine, operating system and versions; if not, the exit status is 1."""
    from archsearch.latency.records import shared_conditions
    from archsearch.studies.experiments.latency_validation import load_all_records

    found = shared_conditions([sample.record for source in records for sample in load_all_records(source)])
    if as_json:
        print_json(found)
    else:
        rows = [
            (what, "the same" if len(values) == 1 else f"{len(values)} different", value, str(count))
            for what, values in found.items()
            for value, count in values.items()
        ]
        print_table("", ("", "", "", "records"), rows)
    if any(len(values) > 1 for values in found.values()):
        raise typer.Exit(1)


@contextmanager
def told_in_a_line(device: str) -> Iterator[None]:
    """A net that can not be timed, or a device that went away, as the user's mistake; both say what is the matter."""
    from archsearch.latency.base import DeviceLostError, MeasurementError
    from snapgen.errors import InputError

    try:
        yield
    except DeviceLostError as error:
        raise InputError(device, str(error), error.remedy) from None
    except MeasurementError as error:
        raise InputError(device, str(error), "change the net or its settings, or predict it") from None


def _print_record(net: str, record: LatencyRecord) -> None:
    what = f"{record.source}, {record.device}, {record.chip}, {record.compute_units}, {record.runtime}"
    low, high = record.estimate.low, record.estimate.high
    measured = f", {record.runs} runs{'' if record.steady else ', not steady'}, loaded in {record.load_ms:.0f} ms"
    how = "" if record.interval_ms else measured
    typer.echo(f"{net}: {record.median_ms:.4g} ms, {record.interval_name} {low:.4g}–{high:.4g} ms{how}; {what}")
    if record.neural_engine_operations is not None:
        share = record.neural_engine_share
        of_cost = "" if share is None else f"{share:.0%} of the estimated time, "
        typer.echo(f"On the Neural Engine: {of_cost}{record.neural_engine_operations:.0%} of the operations")


def _print_operations(record: LatencyRecord, operations: Sequence[PlacedOp]) -> None:
    if not operations:
        return
    costly = sorted(operations, key=lambda op: -op.weight)
    rows = [(op.name, op.operator, op.unit, f"{op.weight * record.median_ms:.3g}") for op in costly[:COSTLIEST]]
    typer.echo(f"\nThe costliest of {len(operations)} operations (Core ML's estimate, not a measurement)")
    print_table("", ("", "operator", "on", "ms"), rows)


def _print_shares(prediction: LatencyPrediction) -> None:
    shares = sorted(prediction.shares.items(), key=lambda share: -share[1])
    rows = [(kind, f"{ms:.3g}", f"{ms / prediction.ms:.0%}") for kind, ms in shares if ms]
    typer.echo("\nBy kind of operation (an estimate, not a measurement)")
    print_table("", ("", "ms", "share"), rows)


def _print_residuals(model: LatencyModel) -> None:
    if not model.residuals:
        return
    rows = [
        (
            r.what,
            r.device,
            f"{r.published:.4g} {r.unit}",
            f"{r.predicted:.4g} {r.unit}",
            f"{r.error:+.1%}",
            "–" if r.left_out_ratio is None else f"× {r.left_out_ratio:.2f}",
            r.used,
        )
        for r in model.residuals
    ]
    typer.echo(f"\nThe profile {model.device} on every published figure. {model.freedom}")
    typer.echo("Left out: what a fit to the other figures predicts, over the published.")
    print_table("", ("", "of", "published", "predicted", "error", "left out", "used"), rows)
