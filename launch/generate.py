"""Continues a text with a trained model: launch/generate.py --run runs/X --prompt TEXT

The text streams to standard output as it is made, the prompt first; tokens per second go to standard error.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else `import pretrain` would find launch/pretrain.py


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run, runs/<name>")
    parser.add_argument("--step", help="a checkpoint's step, or best (lowest validation loss); default: the newest")
    parser.add_argument("--prompt", required=True, help="text to continue; empty: begin a new document")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest continuation in tokens (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest tokens; 0: all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the likeliest that reach p; 1: all (default)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu")
    options = parser.parse_args(argv)
    if options.step not in (None, "best") and not options.step.isdecimal():
        parser.error(f"--step: got {options.step!r}, allowed: a number or best")
    return options


def prompt_tokens(prompt: str, tokenizer, document_mask: bool) -> list[int]:
    """The prompt as the model met text in training: a document follows the end of another, unless a mask hides it."""
    ids = tokenizer.encode(prompt)
    return ids if ids and document_mask else [tokenizer.end_of_document_id, *ids]


def pick_device(name: str | None):
    """The device of that name; None: the first GPU, else the CPU. Raises ValueError when it is not there."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"--device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def run(options: argparse.Namespace) -> None:
    """Loads, generates, prints. Raises ValueError and its like with a sentence for the user."""
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.generate import generate, stream_text
    from pretrain.run import load_model

    device = pick_device(options.device)
    config, model = load_model(options.run, int(options.step) if (options.step or "").isdecimal() else options.step)
    if config.tokenizer.path is None:
        raise ValueError(f"{options.run}: trained without a tokenizer (tokenizer.path), so it cannot read a prompt")
    tokenizer = Tokenizer.load(Path(config.tokenizer.path))
    prompt_ids = prompt_tokens(options.prompt, tokenizer, config.data.document_mask)
    new_ids = generate(
        model.to(device),
        prompt_ids,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop_id=tokenizer.end_of_document_id,
    )
    made = 0

    def counted() -> Iterator[int]:
        nonlocal made
        for token in new_ids:
            made += 1
            yield token

    started = time.perf_counter()
    print(options.prompt, end="", flush=True)
    for piece in stream_text(tokenizer.decode, prompt_ids, counted()):
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - started
    print(flush=True)
    print(f"{made} tokens in {seconds:.1f} s, {made / seconds:.1f} tokens/s", file=sys.stderr)


def main() -> int:
    """-> exit status: 0 done, 2 refused, 130 interrupted."""
    options = parse(sys.argv[1:])
    from pretrain.config import ConfigError  # after the flags are known to be right: torch takes seconds
    from pretrain.runtime.checkpoint import CheckpointError

    try:
        run(options)
    except (CheckpointError, ConfigError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
