"""Continues texts with a trained model.

    launch/generate.py --run runs/X --prompt TEXT [--prompt TEXT ...]
    launch/generate.py --model HF_FOLDER --prompts-file FILE --output FILE.jsonl

Prompts run through the model together, --batch-size at a time. The texts stream to standard output in the order of the prompts,
each after its prompt; the speed goes to standard error. With --temperature 0 they equal those of transformers.

Exit status: 0 done, 2 refused, 130 interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else `import pretrain` would find launch/pretrain.py

from pretrain import UserError
from pretrain.run import command_line
from pretrain.run.command_line import at_least


def parse(argv: list[str]) -> argparse.Namespace:
    parser = command_line.make_parser(__doc__)
    command_line.add_trained_model(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                        help="text to continue; empty: start a new document; repeatable")  # fmt: skip
    parser.add_argument("--prompts-file", metavar="FILE", help="one prompt per line, or .jsonl with a key prompt; - reads one "
                        "prompt per line from standard input")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help='new file for one {"prompt", "text"} per line, instead of standard output')  # fmt: skip
    parser.add_argument("--batch-size", type=at_least(1), default=16, metavar="N",
                        help="prompts at a time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=at_least(0), default=200, metavar="N",
                        help="maximum length of a continuation (default: %(default)s)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)")
    parser.add_argument("--top-k", type=at_least(0), default=0, metavar="K",
                        help="sample from the K likeliest tokens; 0: from all (default)")  # fmt: skip
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="sample from the likeliest tokens that reach probability P; 1: from all (default)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if available, else cpu")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], help="format of the weights; default: bf16 on a GPU, fp32 on a CPU"
    )
    options = parser.parse_args(argv)
    command_line.check_trained_model(parser, options)
    if not options.prompt and not options.prompts_file:
        parser.error("give --prompt or --prompts-file")
    if not options.temperature >= 0:
        parser.error(f"--temperature: got {options.temperature}, must be at least 0")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p: got {options.top_p}, must be above 0 and at most 1")
    if options.output and options.output.exists():
        parser.error(f"--output: {options.output} exists already; choose another file, or remove it first")
    if options.output and not options.output.parent.is_dir():
        parser.error(f"--output: the folder {options.output.parent} does not exist; create it first")
    return options


def read_prompts(prompts: list[str], file: str | None) -> list[str]:
    """The given prompts, then those in the file (-: standard input). Raises UserError, OSError."""
    if file is None:
        return prompts
    try:
        # Split at newlines only: a text may contain other line breaks, such as U+2028.
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = [line.removesuffix("\r") for line in data.decode().removesuffix("\n").split("\n")] if data else []
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 ({error})") from None
    found = [] if file.endswith(".jsonl") else lines
    for number, line in enumerate([] if found else lines, start=1):
        try:
            if line.strip():
                found.append(json.loads(line)["prompt"] + "")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{file}:{number}: is not a JSON object with a text "prompt" ({error})') from None
    if not prompts + found:
        raise UserError(f"{file}: contains no prompts")
    return prompts + found


def encoder_of_run(trained, tokenizer) -> tuple[Callable[[str], list[int]], set[int]]:
    """(prompt -> ids, stop ids) for a run: as in training, a text follows the end of another one, unless a mask hides that."""
    end = tokenizer.end_of_document_id

    def encode(prompt: str) -> list[int]:
        ids = tokenizer.encode(prompt)
        return ids if ids and trained.document_mask else [end, *ids]

    return encode, {end}


def encoder_of_hf_folder(trained, tokenizer) -> tuple[Callable[[str], list[int]], set[int]]:
    """(prompt -> ids, stop ids) for a Hugging Face folder, as its files configure them for transformers: special tokens in a
    prompt are encoded as such, and a chat model may have several stop ids."""
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
    """The torch device of that name; None: the first GPU, else the CPU. Raises UserError if it is not available."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA raises AssertionError
        raise UserError(f"--device: {name!r} is not available: {str(error).splitlines()[0]}") from error
    return device


def continuations(options: argparse.Namespace, count_token: Callable[[], None]) -> Iterator[tuple[str, Iterator[str]]]:
    """(prompt, its continuation in pieces), in order; calls `count_token` for each new token. Raises UserError, OSError."""
    from pretrain.generate import generate_batch, ids_of_each, stream_text
    from pretrain.interop.load import open_hf_folder, open_run
    from pretrain.interop.weights import DTYPES, load_transformer

    device, prompts = pick_device(options.device), read_prompts(options.prompt, options.prompts_file)
    trained = (
        open_run(options.run, options.step, last_weights=options.last_weights) if options.run else open_hf_folder(options.model)
    )
    tokenizer = trained.require_tokenizer()
    encode, stop_ids = (encoder_of_run if options.run else encoder_of_hf_folder)(trained, tokenizer)
    ids = [encode(prompt) for prompt in prompts]
    dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    model = load_transformer(trained.weights)
    for parameter in model.parameters():  # buffers, such as the routers' biases, stay fp32
        parameter.data = parameter.data.to(dtype)
    model.to(device)

    def counted(new_ids: Iterator[int]) -> Iterator[int]:
        for token in new_ids:
            count_token()
            yield token

    for first in range(0, len(prompts), options.batch_size):
        batch = slice(first, first + options.batch_size)
        steps = generate_batch(
            model,
            ids[batch],
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed + first,
            stop_ids=stop_ids,
        )
        for prompt, prompt_ids, new_ids in zip(prompts[batch], ids[batch], ids_of_each(steps, len(ids[batch])), strict=True):
            yield prompt, stream_text(tokenizer.decode, prompt_ids, counted(new_ids))


def generate_texts(options: argparse.Namespace) -> None:
    """Loads the model, generates, and prints the texts or writes them to --output. Raises UserError, OSError."""
    tokens, seconds, output = 0, 0.0, None

    def count_token() -> None:
        nonlocal tokens
        tokens += 1

    for number, (prompt, pieces) in enumerate(continuations(options, count_token)):
        started = time.perf_counter()
        if options.output:  # created only once there is something to write
            output = output or options.output.open("x", encoding="utf-8")
            print(json.dumps({"prompt": prompt, "text": "".join(pieces)}, ensure_ascii=False), file=output, flush=True)
        else:
            print("\n" * (number > 0) + prompt, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)
        seconds += time.perf_counter() - started
        if options.output and sys.stderr.isatty():
            print(f"\r{number + 1} texts, {tokens / seconds:.1f} tokens/s", end="", file=sys.stderr, flush=True)
    print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)


def main(argv: list[str]) -> None:
    """Raises UserError, OSError."""
    options = parse(argv)
    import torch  # only now, as it takes seconds: the flags are correct

    with torch.inference_mode():
        generate_texts(options)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
