# SPDX-License-Identifier: Apache-2.0
"""`fastvlm bench`: time to the first token, throughput and memory, beside other models or between engines."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .cli_errors import UserError, notice, reports_errors
from .progress_bars import progress_bar
from .text_tables import print_table

__all__ = ["bench"]


@reports_errors
def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="0.5B, 1.5B or 7B: that architecture with random weights, which does not change the speed; or a "
            "checkpoint's directory or name; or tiny, the test model that ships with the package. Default: 0.5B.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE[:PRECISION][=DIRECTORY],…",
            help="Measure these engines instead, separated by commas, such as transformers:bfloat16,onnx:q8=DIRECTORY; "
            "without a directory each takes MODEL.",
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            help="Models to compare with, separated by commas: native (Transformers' fast_vlm), "
            "llava-onevision-0.5b (at 1152 px), or any image-text-to-text model's directory or name."
        ),
    ] = "",
    size: Annotated[
        str | None,
        typer.Option(help="Image sizes in pixels, separated by commas. Default: the size each model was trained for."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16 or float16, or several separated by commas; auto: bfloat16 on CUDA, else float32."
        ),
    ] = "auto",
    batch_size: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    device: options.Device = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: one for each CPU.")] = None,
    repetitions: Annotated[int, typer.Option(help="Measured runs of each case; cases alternate.")] = 5,
    warmup: Annotated[int, typer.Option(help="Runs of each case before the measured ones.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Text tokens in the prompt, without the image's tokens.")] = 20,
    image: Annotated[str | None, typer.Option(help="Image file. Default: a drawn JPEG of 12 megapixels.")] = None,
    image_backend: Annotated[str, typer.Option(help="pil, or torchvision on the model's device.")] = "pil",
    attn_implementation: Annotated[
        str | None, typer.Option(help="sdpa, eager, flash_attention_2 or another that Transformers knows.")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the encoder, the projector and the decoding step.")
    ] = False,
    fuse: Annotated[bool, typer.Option("--fuse", help="Also measure FastVLM after fuse().")] = False,
    encoders: Annotated[
        bool, typer.Option("--encoders", help="Measure only encoders: FastViTHD, ViT-L/14, ViTamin-L, ConvNeXt-L.")
    ] = False,
    output: options.RecordFile = None,
    note: Annotated[str | None, typer.Option(help="Free text that is stored in the record.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Directory for plots.")] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure the time to the first token and its parts on this machine.

    Examples:

        fastvlm bench 0.5B --size 512,1024 --against native -o bench.json

        fastvlm bench --encoders --size 512 --plots plots

        fastvlm bench tiny --engine transformers,onnx:q8=tiny-onnx
    """
    names = _words(against, "--against")
    if engine is not None:
        given = {"--against": names, "--size": size, "--dtype": dtype != "auto", "--batch-size": batch_size != "1"}
        given |= {"--prompt-tokens": prompt_tokens != 20, "--image-backend": image_backend != "pil"}
        given |= {"--attn-implementation": attn_implementation, "--compile": compile, "--fuse": fuse}
        _leave_out(
            "--engine measures engines with their own settings", given | {"--encoders": encoders, "--plots": plots}
        )
    if encoders:
        given = {"MODEL": bool(models), "--against": names, "--size": size, "--image": image}
        given["--attn-implementation"] = attn_implementation
        _leave_out("--encoders measures only encoders, at fixed sizes", given)
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output is {output}, but there is no directory {output.parent}. Create it first.")
    sizes, batches = _numbers(size, "--size") if size else (), _numbers(batch_size, "--batch-size")
    if plots is not None:
        _check_matplotlib()
    cpus = _cpus() if threads is None else threads
    if engine is not None:
        common: dict[str, Any] = {"threads": cpus, "warmup": warmup, "repetitions": repetitions}
        common |= {"new_tokens": new_tokens, "image": image, "note": note}
        record = _measure_engines(_words(engine, "--engine"), models or [], device, common)
        _show(record, _print_engines, output, as_json)
        return

    from ..bench import Options, run, run_encoders

    place = _device(device)
    chosen = Options(
        models=tuple(models or ("0.5B",)),
        against=names,
        sizes=sizes,
        dtypes=_dtypes(dtype, place),
        batches=batches,
        device=place,
        threads=cpus,
        warmup=warmup,
        repetitions=repetitions,
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        image=image,
        image_backend=image_backend,
        attn_implementation=attn_implementation,
        compile=compile,
        fuse=fuse,
        note=note,
    )

    with progress_bar("measuring", "steps") as show:
        record = run_encoders(chosen, progress=show) if encoders else run(chosen, show)
    _show(record, _print_encoders if encoders else _print_models, output, as_json, plots)


def _measure_engines(named: tuple[str, ...], models: list[str], device: str, common: dict[str, Any]) -> dict[str, Any]:
    from ..bench import EngineOptions, run_engines
    from ..bench.engine_cases import engine_cases

    if len(models) > 1:
        raise UserError(f"--engine takes one MODEL, but {' and '.join(models)} are given.")
    chosen = EngineOptions(engine_cases(named, models[0] if models else None, device), **common)
    with progress_bar("measuring", "steps") as show:
        return run_engines(chosen, show)


def _show(
    record: dict[str, Any],
    print_tables: Callable[[dict[str, Any]], None],
    output: Path | None,
    as_json: bool,
    plots: Path | None = None,
) -> None:
    """Write the record and its plots to the requested files, and print the record or its tables."""
    from ..bench import write_plots
    from ..bench.measuring import write_record

    text = write_record(record, output)
    if output is not None:
        notice(f"wrote {output}")
    for file in write_plots(record, plots) if plots is not None else ():
        notice(f"wrote {file}")
    if as_json:
        typer.echo(text, nl=False)
    else:
        print_tables(record)


def _leave_out(why: str, given: dict[str, Any]) -> None:
    """Raise UserError if one of these options has a value."""
    for option, value in given.items():
        if value:
            raise UserError(f"{why}; leave out {option}.")


def _words(text: str, option: str) -> tuple[str, ...]:
    if not text:
        return ()
    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise UserError(f"{option} is {text!r}; expected names separated by single commas.")
    return words


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise UserError(
            f"{option} is {text!r}; expected whole numbers separated by commas, such as 512,1024."
        ) from error


def _dtypes(text: str, device: str) -> tuple[str, ...]:
    if text == "auto":
        return ("bfloat16" if device.startswith("cuda") else "float32",)
    return _words(text, "--dtype")


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_matplotlib() -> None:
    """Raise UserError for a missing matplotlib before minutes of measurements, not after them."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UserError('--plots needs matplotlib: pip install "transformers-fastvlm[bench]".')


def _print_models(record: dict[str, Any]) -> None:
    columns = ("model", "px", "dtype", "batch", "tokens", "preprocess", "encode", "project", "prefill", "first token")
    rows: list[tuple[str, ...]] = []
    for result in record["results"]:
        seconds = result["seconds"]
        first = seconds["first_token"]
        rows.append(
            (
                result["model"],
                "-" if result["resolution"] is None else str(result["resolution"]),
                result["dtype"],
                str(result["batch"]),
                str(result["prompt_tokens"]),
                *(_ms(seconds.get(part)) for part in ("preprocess", "encode", "project", "prefill")),
                f"{_ms(first)} ({1000 * first['q1']:.0f}-{1000 * first['q3']:.0f})",
                _ms(seconds["first_decode"]),
                f"{result['tokens_per_second']['median']:.1f}",
                "-" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.2f}",
            )
        )
    print_table("milliseconds: medians (quartiles)", (*columns, "next token", "tokens/s", "GiB"), rows)
    for found in record["ratios"]:
        if found["of"] != "seconds":
            continue
        ratios = found["ratios"]
        parts = [
            f"{ratios[name]:.2f} x {words}"
            for name, words in (
                ("encode", "the encoder's time"),
                ("first_token_from_pixels", "the first token's from pixel values"),
                ("first_token", "the first token's from the file"),
            )
            if name in ratios
        ]
        other, own = (
            f"{found[name]}" + ("" if found[side] is None else f" at {found[side]} px")
            for name, side in (("model", "resolution"), ("over", "over_resolution"))
        )
        typer.echo(f"{other} takes {', '.join(parts)} of {own} ({found['dtype']}, batch {found['batch']})")
    _print_machine(record)


def _print_encoders(record: dict[str, Any]) -> None:
    rows: list[tuple[str, ...]] = [
        (
            result["model"],
            str(result["resolution"]),
            result["dtype"],
            str(result["batch"]),
            f"{result['parameters'] / 1e6:.1f}",
            str(result["tokens"]),
            f"{_ms(result['seconds'])} ({1000 * result['seconds']['q1']:.0f}-{1000 * result['seconds']['q3']:.0f})",
            str(result["gigaflop"]),
            f"{result['share_of_gemm_rate']:.0%}",
        )
        for result in record["results"]
    ]
    columns = ("encoder", "px", "dtype", "batch", "M parameters", "tokens", "milliseconds", "GFLOP", "of GEMM rate")
    print_table("milliseconds: medians (quartiles)", columns, rows)
    _print_machine(record)


def _print_engines(record: dict[str, Any]) -> None:
    columns = ("engine", "precision", "device", "px", "load s", "preprocess", "first token", "tokens/s", "GiB")
    rows: list[tuple[str, ...]] = []
    for result in record["results"]:
        load, rate, first = result["load_seconds"], result["tokens_per_second"], result["seconds"]["first_token"]
        rows.append(
            (
                result["engine"],
                result["precision"],
                result["device"],
                str(result["size"]),
                f"{load['engine'] + load['first_answer']:.1f}",
                _ms(result["seconds"]["preprocess"]),
                f"{_ms(first)} ({1000 * first['q1']:.0f}-{1000 * first['q3']:.0f})",
                "-" if rate is None else f"{rate['median']:.1f}",
                "-" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.2f}",
            )
        )
    print_table("milliseconds: medians (quartiles)", columns, rows)
    _print_machine(record)
    fastest = record["results"][record["fastest"]["result"]]
    rate = fastest["tokens_per_second"]
    speed = "" if rate is None else f" and {rate['median']:.1f} tokens/s"
    typer.echo(
        f"fastest here: {fastest['engine']} in {fastest['precision']}, first token after "
        f"{_ms(fastest['seconds']['first_token'])} ms{speed}: {record['fastest']['command']}"
    )


def _print_machine(record: dict[str, Any]) -> None:
    machine, versions, chosen = record["machine"], record["versions"], record["options"]
    place = machine.get("gpu") or f"{machine['cpu']}, {_count(chosen['threads'], 'thread')}"
    typer.echo(
        f"{place}; torch {versions['torch']}, transformers {versions['transformers']}; "
        f"{_count(chosen['repetitions'], 'run')} in turns after {chosen['warmup']} to warm up"
    )


def _ms(seconds: dict[str, Any] | None) -> str:
    if seconds is None:
        return "-"
    milliseconds = 1000 * seconds["median"]
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")
