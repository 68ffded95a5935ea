# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The command line: `mla-jax generate`, `mla-jax bench` and `mla-jax info`."""

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from tokenizers import Tokenizer

import mla_jax
from mla_jax.bench import cases, generation, models, op, pictures, profile, step
from mla_jax.bench import report as reporting
from mla_jax.cache import PagedKVCache
from mla_jax.checkpoint import read_json
from mla_jax.config import DTYPES, DeepseekConfig
from mla_jax.decode import Explanation, explain
from mla_jax.deepseek import DeepseekForCausalLM
from mla_jax.generate import stream

TINY = Path(__file__).parent / "tiny"  # the model that ships in the package
_DEFAULT_PROMPT = "ROMEO.\n"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, or 2 after an error."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.traceback:
            raise
        causes = error.exceptions if isinstance(error, ExceptionGroup) else [error]
        text = "; ".join(" ".join(str(cause).split()) for cause in causes)
        print(f"mla-jax: error: {text or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mla-jax", description="FlashMLA for JAX.")
    parser.add_argument("--version", action="version", version=f"mla-jax {mla_jax.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    common.add_argument("--traceback", action="store_true", help="show where an error came from")

    command = commands.add_parser(
        "generate", parents=[common], help="continue a prompt with a DeepSeek checkpoint"
    )
    command.set_defaults(run=_generate)
    add = command.add_argument
    add("--model", type=Path, metavar="FOLDER", help="Hugging Face folder; default: the tiny model")
    source = command.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="text to continue; repeat for a batch")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="file to continue")
    add("--max-new-tokens", type=int, default=200, metavar="N")
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token; default 0.8")
    add("--top-k", type=int, metavar="K", help="draw among the K most likely tokens")
    add(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw among the likeliest tokens that make up probability P; default 0.95",
    )
    add("--seed", type=int, default=0)
    add("--page-size", type=int, default=64, metavar="N", help="tokens per page of the cache")
    add("--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens per pass")
    add("--implementation", help="of the attention op; default: the first that can run here")
    add(
        "--dtype",
        choices=DTYPES,
        help="of parameters and computation; default: the checkpoint's, but float32 on a CPU",
    )

    command = commands.add_parser("bench", help="measure our implementations and the peers")
    modes = command.add_subparsers(title="what to measure", required=True, metavar="MODE")
    command = modes.add_parser("op", parents=[common], help="one call of the attention op")
    command.set_defaults(run=_bench_op)
    add = command.add_argument
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "--shapes", nargs="+", metavar="B,S_Q,S_K,H_Q", help="such as 128,1,4096,128"
    )
    source.add_argument("--model", choices=cases.MODELS, help="decode steps of a model")
    add("--varlen", action="store_true", help="lengths that differ, s_k on average")
    add("--compare", nargs=2, metavar=("A", "B"), help="add how many times as fast as B A is")
    what = "ours and peers; default: all; ffi-invariant is ffi with batch_invariant=True"
    add("--implementations", nargs="+", metavar="NAME", help=what)
    add("--rounds", type=int, default=7, metavar="N", help="of which the median counts; default 7")
    add("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    add("--out", type=Path, metavar="FOLDER", help="write results.json and pictures there")

    for name, run, what in (
        ("generate", _bench_generate, "tokens a second of a whole model, after a long context"),
        ("step", _bench_step, "decode steps of a model's attention layers"),
    ):
        command = modes.add_parser(name, parents=[common], help=what)
        command.set_defaults(run=run)
        add = command.add_argument
        add("--model", choices=models.PRESETS, default="deepseek-v2-lite", help="random weights")
        add("--layers", type=int, metavar="N", help="the first N layers; default: all")
        add("--batches", nargs="+", type=int, metavar="B", help="numbers of sequences")
        if name == "generate":
            add("--context", type=int, metavar="N", help="tokens in the cache; default 4096")
        else:
            add("--contexts", nargs="+", type=int, metavar="N", help="tokens in the cache")
        add("--implementations", nargs="+", metavar="NAME", help="ours; default: all")
        add("--steps", type=int, metavar="N", help="of the shorter of two runs that are compared")
        add("--rounds", type=int, default=5, metavar="N", help="of which the median counts")
        add("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
        add("--profile", type=Path, metavar="FOLDER", help="trace each there, print its kernels")
        add("--out", type=Path, metavar="FOLDER", help="write results.json and a picture there")

    command = commands.add_parser(
        "info", parents=[common], help="show devices, versions and the implementation that runs"
    )
    command.set_defaults(run=_info)
    return parser


@dataclass(frozen=True)
class _Report:
    """What a generation was and took; the fields of `--json`."""

    prompts: list[str]
    texts: list[str]
    tokens: list[list[int]]
    num_tokens: int
    load_seconds: float
    first_token_seconds: float
    tokens_per_second: float | None
    implementation: str | None
    device: str
    cache_bytes_per_token: int
    mha_bytes_per_token: int


def _generate(args: argparse.Namespace) -> None:
    folder = TINY if args.model is None else args.model
    if args.prompt_file is not None:
        prompts = [args.prompt_file.read_text(encoding="utf-8")]
    else:
        prompts = args.prompt or [_DEFAULT_PROMPT]
    tokenizer = _load_tokenizer(folder)
    bos_id = _bos_id(tokenizer, folder)
    ids = [_encode(tokenizer, bos_id, prompt) for prompt in prompts]
    start = time.perf_counter()
    model = _load_model(folder, args.dtype)
    loaded = time.perf_counter()

    live = not args.json and len(prompts) == 1
    if live:
        print(prompts[0], end="", flush=True)
    tokens: list[list[int]] = [[] for _ in prompts]
    shown = ""
    times = []  # (seconds, tokens) after each burst
    for burst in stream(
        model,
        ids,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        page_size=args.page_size,
        prefill_chunk=args.prefill_chunk,
        implementation=args.implementation,
    ):
        tokens = [old + new for old, new in zip(tokens, burst, strict=True)]
        times.append((time.perf_counter(), sum(map(len, tokens))))
        if live:
            text = tokenizer.decode(tokens[0])
            # The last character may be half there: its other bytes come with the next tokens.
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            print(text[len(shown) :], end="", flush=True)
            shown = text

    texts = [tokenizer.decode(new) for new in tokens]
    # The first two bursts hold the compilation of prefill and of the loop.
    rate = None
    if len(times) > 2:
        rate = (times[-1][1] - times[1][1]) / (times[-1][0] - times[1][0])
    config = model.config
    layers, itemsize = config.num_hidden_layers, jnp.dtype(model.dtype).itemsize
    mha_width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    report = _Report(
        prompts=prompts,
        texts=texts,
        tokens=tokens,
        num_tokens=times[-1][1],
        load_seconds=round(loaded - start, 3),
        first_token_seconds=round(times[0][0] - loaded, 3),
        tokens_per_second=None if rate is None else round(rate, 1),
        implementation=_explain(
            config, len(prompts), args.page_size, model.dtype, args.implementation
        ).implementation,
        device=jax.devices()[0].device_kind,
        cache_bytes_per_token=PagedKVCache.bytes_per_token(
            num_layers=layers, d_k=config.d_cache, dtype=model.dtype
        ),
        mha_bytes_per_token=layers * config.num_attention_heads * mha_width * itemsize,
    )
    if args.json:
        print(json.dumps(asdict(report)))
        return
    print(texts[0][len(shown) :] if live else _join(prompts, texts))
    speed = "" if rate is None else f", {rate:.0f} tokens/s once compiled"
    print(
        f"\n{report.num_tokens} tokens{speed}; "
        f"first token after {report.first_token_seconds:.1f} s (with compilation)\n"
        f"implementation {report.implementation} on {report.device}\n"
        f"cache {report.cache_bytes_per_token:,} bytes a token; multi-head attention would take "
        f"{report.mha_bytes_per_token:,} "
        f"({report.mha_bytes_per_token / report.cache_bytes_per_token:.1f} times)"
    )


def _join(prompts: Sequence[str], texts: Sequence[str]) -> str:
    return "\n---\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True))


def _load_model(folder: Path, dtype: str | None) -> DeepseekForCausalLM:
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"  # which CPUs multiply faster than narrower types
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("load", total=None)
        return DeepseekForCausalLM.from_pretrained(
            folder,
            param_dtype=dtype,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"--model: {str(folder)!r} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer: {error}") from None


def _bos_id(tokenizer: Tokenizer, folder: Path) -> int | None:
    """Finds the token that tokenizer_config.json asks to put before a text, if it does."""
    name = "tokenizer_config.json"
    settings = read_json(folder, name) if (folder / name).is_file() else {}
    if not settings.get("add_bos_token"):
        return None
    bos = settings.get("bos_token")
    return tokenizer.token_to_id(bos["content"] if isinstance(bos, dict) else str(bos))


def _encode(tokenizer: Tokenizer, bos_id: int | None, text: str) -> list[int]:
    """Encodes a prompt, after the token of the beginning where there is one."""
    ids = tokenizer.encode(text).ids
    if bos_id is not None and ids[:1] != [bos_id]:
        ids = [bos_id, *ids]
    if not ids:
        raise ValueError("--prompt: got an empty text, expected at least one token")
    return ids


def _explain(
    config: DeepseekConfig, b: int, page_size: int, dtype: jnp.dtype, implementation: str | None
) -> Explanation:
    """Says what runs a decode step of one token for each of `b` sequences."""
    shape = jax.ShapeDtypeStruct
    return explain(
        shape((b, 1, config.num_attention_heads, config.d_cache), dtype),
        shape((b, page_size, 1, config.d_cache), dtype),
        shape((b, 1), jnp.int32),
        shape((b,), jnp.int32),
        config.kv_lora_rank,
        causal=True,
        implementation=implementation,
    )


def _bench_op(args: argparse.Namespace) -> None:
    platform = jax.default_backend()
    if args.shapes is not None:
        shapes = [cases.parse_shape(text) for text in args.shapes]
    elif args.model is not None:
        shapes = cases.model_shapes(args.model, platform)
    else:
        shapes = list(cases.CPU_SHAPES if platform == "cpu" else cases.GPU_SHAPES)
    if args.varlen:
        shapes = [replace(shape, varlen=True) for shape in shapes]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("ceilings", total=len(shapes) * (args.rounds + 3))
        found = op.run(
            shapes,
            dtype=args.dtype,
            implementations=args.implementations,
            compare=args.compare,
            rounds=args.rounds,
            tick=lambda what: progress.update(task, advance=1, description=what),
            # A run that is stopped keeps the rows that it has.
            done=lambda so_far: None if args.out is None else reporting.write(so_far, args.out),
        )
    missing = None if args.out is None else pictures.draw_op(found, args.out)
    if args.json:
        print(json.dumps(reporting.to_json(found)))
    else:
        out = Console(highlight=False, soft_wrap=True)
        reporting.print_report(
            found, out if out.is_terminal else Console(highlight=False, width=200)
        )
    if missing is not None:
        print(f"mla-jax: {missing}", file=sys.stderr)


def _bench_generate(args: argparse.Namespace) -> None:
    options = {"batches": args.batches, "context": args.context}
    show, draw = reporting.print_generation, pictures.draw_generation
    _bench_steps("generate", args, generation.run, show, draw, options)


def _bench_step(args: argparse.Namespace) -> None:
    options = {"batches": args.batches, "contexts": args.contexts}
    show, draw = reporting.print_steps, pictures.draw_steps
    _bench_steps("step", args, step.run, show, draw, options)


def _bench_steps(
    command: str,
    args: argparse.Namespace,
    run: Callable[..., Any],
    show: Callable[[Any, Console], None],
    draw: Callable[[Any, Path], str | None],
    options: dict[str, Any],
) -> None:
    """Runs, shows and draws what measures decode steps."""
    out = Console(highlight=False, soft_wrap=True)
    out = out if out.is_terminal else Console(highlight=False, width=200)
    profiles = {}

    def trace(name: str, function: Callable[[], Any]) -> None:
        profiles[name] = profile.trace(function, args.profile / name)

    def as_json(report: Any) -> str:
        traced = {name: asdict(found) for name, found in profiles.items()}
        return json.dumps(reporting.steps_to_json(command, report) | {"profiles": traced})

    def write(report: Any) -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.json").write_text(as_json(report) + "\n", encoding="utf-8")

    if args.steps is not None:
        options["steps"] = args.steps
    console, start = Console(stderr=True), time.perf_counter()

    def log(what: str) -> None:  # where nothing can be drawn over
        print(f"mla-jax: {time.perf_counter() - start:.0f} s: {what}", file=sys.stderr, flush=True)

    with console.status("ceilings") as status:
        found = run(
            args.model,
            layers=args.layers,
            dtype=args.dtype,
            implementations=args.implementations,
            rounds=args.rounds,
            tick=status.update if console.is_terminal else log,
            # A run that is stopped keeps the rows that it has.
            done=lambda so_far: None if args.out is None else write(so_far),
            profile=None if args.profile is None else trace,
            **options,
        )
    if args.out is not None:
        write(found)
        if (missing := draw(found, args.out)) is not None:
            print(f"mla-jax: {missing}", file=sys.stderr)
    if args.json:
        print(as_json(found))
        return
    show(found, out)
    for name, traced in profiles.items():
        reporting.print_profile(name, traced, out)


def _info(args: argparse.Namespace) -> None:
    config = DeepseekForCausalLM.read_config(TINY)
    choice = _explain(config, 1, 64, jnp.dtype(jnp.bfloat16), None)
    versions = {"mla-jax": mla_jax.__version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "numpy"):
        versions[name] = importlib.metadata.version(name)
    devices = [f"{d.id}: {d.device_kind}" for d in jax.devices()]
    info = {
        "versions": versions,
        "platform": jax.default_backend(),
        "devices": devices,
        "implementation": choice.implementation,
        "not": choice.reasons,
    }
    if args.json:
        print(json.dumps(info))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print("  ".join(f"{name} {version}" for name, version in versions.items()))
    console.print(f"devices ({info['platform']}): {', '.join(devices)}", markup=False)
    console.print(f"decode, bfloat16, 576 wide, page 64: {choice}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
