"""Continues texts with a trained model.

    launch/generate.py --run runs/X --prompt TEXT [--prompt TEXT ...]
    launch/generate.py --model HF_FOLDER --prompts-file FILE --output FILE.jsonl

Prompts run through the model together, --batch-size at a time. The texts stream to standard output in the order of the prompts,
each begun with its prompt; tokens per second go to standard error. With --temperature 0 they are those of transformers.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else `import pretrain` would find launch/pretrain.py

from pretrain.checkpoint.manifest import CheckpointError
from pretrain.config import ConfigError


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a run, runs/<name>")
    source.add_argument("--model", type=Path, help="Hugging Face folder")
    parser.add_argument("--step", help="--run: a checkpoint's step, or best (lowest validation loss); default: the newest")
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to continue; empty: begin a new document; repeatable"
    )
    parser.add_argument("--prompts-file", type=Path, help="a prompt a line, or .jsonl with a key prompt")
    parser.add_argument("--output", type=Path, help="write {prompt, text} a line to this new file instead of standard output")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest continuation in tokens (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest tokens; 0: all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the likeliest that reach p; 1: all (default)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of the weights; default: bf16 on a GPU, fp32 on a CPU")
    options = parser.parse_args(argv)
    if options.step not in (None, "best") and not options.step.isdecimal():
        parser.error(f"--step: got {options.step!r}, allowed: a number or best")
    if options.step and options.model:
        parser.error("--step belongs to --run: a Hugging Face folder has one model")
    if not options.prompt and not options.prompts_file:
        parser.error("give --prompt or --prompts-file")
    if options.batch_size < 1:
        parser.error(f"--batch-size: got {options.batch_size}, must be at least 1")
    if options.output and options.output.exists():
        parser.error(f"--output: {options.output} exists already; choose another, or remove it first")
    if options.output and not options.output.parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.parent}; make it first")
    return options


def read_prompts(options: argparse.Namespace) -> list[str]:
    """All prompts, those of the file last. Raises ValueError, OSError."""
    path, prompts = options.prompts_file, list(options.prompt)
    if path is None:
        return prompts
    try:
        with path.open(encoding="utf-8") as file:  # by ends of lines alone: a text may hold other breaks, such as U+2028
            lines = [line.rstrip("\n") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error})") from None
    if path.suffix != ".jsonl":
        prompts += lines
        lines = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                prompts.append(json.loads(line)["prompt"] + "")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number}: is no object with a text "prompt" ({error})') from None
    if not prompts:
        raise ValueError(f"{path}: holds no prompt")
    return prompts


def as_in_training(trained, tokenizer) -> tuple[Callable[[str], list[int]], set[int]]:
    """(prompt -> ids, ids that end a text) of a run: a document follows the end of another, unless a mask hides it."""
    end = tokenizer.end_of_document_id

    def encode(prompt: str) -> list[int]:
        ids = tokenizer.encode(prompt)
        return ids if ids and trained.document_mask else [end, *ids]

    return encode, {end}


def as_the_folder_says(trained, tokenizer) -> tuple[Callable[[str], list[int]], set[int]]:
    """(prompt -> ids, ids that end a text) of a Hugging Face folder, as its files tell transformers: special tokens in the
    prompt are such, and a model that was taught to talk may end in several ways."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(trained.tokenizer / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    files = [trained.tokenizer / name for name in ("generation_config.json", "config.json")]
    settings = json.loads(next(path for path in files if path.is_file()).read_text(encoding="utf-8"))
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [tokenizer.end_of_document_id if ends is None else ends]
    return lambda prompt: library.encode(prompt).ids or [tokenizer.end_of_document_id], set(ends)


def pick_device(name: str | None):
    """The device of that name; None: the first GPU, else the CPU. Raises ValueError when it is not there."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"--device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def texts(options: argparse.Namespace, made: list[int]) -> Iterator[tuple[str, Iterator[str]]]:
    """(prompt, its continuation in pieces), in order; `made` counts the new tokens. Raises ValueError and its like."""
    from pretrain.generate import generate_batch, ids_of_each, stream_text
    from pretrain.interop.load import open_folder, open_run
    from pretrain.interop.weights import DTYPES, load_transformer

    device, prompts = pick_device(options.device), read_prompts(options)
    trained = open_run(options.run, options.step) if options.run else open_folder(options.model)
    if (tokenizer := trained.load_tokenizer()) is None:
        where = "tokenizer.path" if options.run else "tokenizer.json"
        raise ValueError(f"{options.run or options.model}: has no tokenizer ({where}), so it cannot read a prompt")
    encode, stop_ids = (as_in_training if options.run else as_the_folder_says)(trained, tokenizer)
    dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    model = load_transformer(trained.weights)
    for parameter in model.parameters():  # not the routers' biases: they stay fp32
        parameter.data = parameter.data.to(dtype)
    model.to(device)

    def counted(ids: Iterator[int]) -> Iterator[int]:
        for token in ids:
            made[0] += 1
            yield token

    for first in range(0, len(prompts), options.batch_size):
        batch = prompts[first : first + options.batch_size]
        batch_ids = [encode(prompt) for prompt in batch]
        steps = generate_batch(
            model,
            batch_ids,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed + first,
            stop_ids=stop_ids,
        )
        for prompt, prompt_ids, ids in zip(batch, batch_ids, ids_of_each(steps, len(batch)), strict=True):
            yield prompt, stream_text(tokenizer.decode, prompt_ids, counted(ids))


def run(options: argparse.Namespace) -> None:
    """Loads, generates, prints. Raises ValueError and its like with a sentence for the user."""
    made, seconds, output = [0], 0.0, None
    for number, (prompt, pieces) in enumerate(texts(options, made)):
        started = time.perf_counter()
        if options.output:  # which is made once there is something to write
            output = output or options.output.open("x", encoding="utf-8")
            print(json.dumps({"prompt": prompt, "text": "".join(pieces)}, ensure_ascii=False), file=output, flush=True)
        else:
            print("\n" * (number > 0) + prompt, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)
        seconds += time.perf_counter() - started
        if options.output and sys.stderr.isatty():
            print(f"\r{number + 1} texts, {made[0] / seconds:.1f} tokens/s", end="", file=sys.stderr, flush=True)
    print(f"{made[0]} tokens in {seconds:.1f} s, {made[0] / seconds:.1f} tokens/s", file=sys.stderr)


def main() -> int:
    """-> exit status: 0 done, 2 refused, 130 interrupted."""
    options = parse(sys.argv[1:])
    try:
        import torch  # after the flags are known to be right: it takes seconds

        with torch.inference_mode():
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
