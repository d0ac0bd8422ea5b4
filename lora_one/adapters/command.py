"""The commands of ``python -m lora_one.adapters``, on adapters as PEFT stores them."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_one.errors import InputError

DONE, FAILED, BAD_INPUT = 0, 1, 2


def main(arguments: Sequence[str]) -> int:
    """Run the command that was asked for and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except InputError as error:
        return _say(f"error: {error}", BAD_INPUT)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except RuntimeError as error:
        return _say(f"failed: {error}", FAILED)
    except OSError as error:
        return _say(f"failed: {error.filename or ''}: {error.strerror or error}", FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_one.adapters",
        description="Look at adapters as PEFT stores them, and make others of them.",
        epilog="Exit status: 0 done, 1 failed, 2 bad input (one message, nothing written).",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    inspect = commands.add_parser("inspect", help="what is inside, layer by layer")
    inspect.add_argument("adapter", type=Path, help="folder of a PEFT LoRA")
    inspect.add_argument("--layers", metavar="REGEX", help="only layers whose name it is found in")
    inspect.add_argument("--json", action="store_true", help="for other programs, all values")
    inspect.set_defaults(command=_inspect)

    export = commands.add_parser("export", help="another form of an adapter: a new folder")
    export.add_argument("adapter", type=Path, help="folder of a PEFT LoRA")
    export.add_argument("out", type=Path, help="folder to write")
    export.add_argument("--rank", type=int, help="cut every layer's product to this rank")
    export.add_argument(
        "--uniform", action="store_true", help="one rank and one alpha for all layers"
    )
    export.add_argument(
        "--fold-rslora", action="store_true", help="the same scaling without rsLoRA"
    )
    export.set_defaults(command=_export)

    merge = commands.add_parser("merge", help="base and adapter as one model, safetensors")
    merge.add_argument("adapter", type=Path, help="folder of a PEFT LoRA")
    merge.add_argument("out", type=Path, help="folder to write")
    merge.add_argument("--base", help="folder or hub id; default: what the adapter says")
    merge.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the base's"
    )
    merge.set_defaults(command=_merge)

    push = commands.add_parser("push", help="upload it to the Hugging Face hub")
    push.add_argument("adapter", type=Path, help="folder of a PEFT LoRA, with its README.md")
    push.add_argument("repo_id", help="owner/name")
    push.add_argument("--private", action="store_true", help="if the repository is new")
    push.set_defaults(command=_push)

    check = commands.add_parser("check", help="whether vLLM and llama.cpp can use it")
    check.add_argument("adapter", type=Path, help="folder of a PEFT LoRA")
    check.add_argument("--for", dest="program", choices=("vllm", "llama.cpp"), help="one of them")
    check.set_defaults(command=_check)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    from lora_one.adapters.inspection import describe, render
    from lora_one.adapters.stored import read_stored

    facts = describe(read_stored(options.adapter), options.layers)
    print(json.dumps(facts, indent=1) if options.json else render(facts))
    return DONE


def _export(options: argparse.Namespace) -> int:
    from lora_one.adapters.rewrite import fold_rslora, make_uniform, truncate, write_stored
    from lora_one.adapters.stored import check_replaceable, read_stored

    adapter = read_stored(options.adapter)
    out, source = options.out.resolve(), options.adapter.resolve()
    if out in (source, *source.parents):
        raise InputError(
            f"{options.out} is or holds the adapter that is read, which would be lost; choose "
            "another folder to write."
        )
    check_replaceable(options.out)
    done = []
    if options.rank is not None:
        adapter, cut = truncate(adapter, options.rank)
        worst = max(cut.layer_errors, key=cut.layer_errors.__getitem__)
        done.append(
            f"cut to rank {options.rank}: relative error {cut.error:.4g} over all layers, largest "
            f"{cut.layer_errors[worst]:.4g} at {worst}"
        )
    if options.uniform:
        adapter = make_uniform(adapter)
        done.append(f"all layers: rank {adapter.config['r']}, alpha {adapter.config['lora_alpha']}")
    if options.fold_rslora:
        adapter = fold_rslora(adapter)
        done.append(f"without rsLoRA: alpha {adapter.config['lora_alpha']}")
    if not done:
        raise InputError("nothing to do: give --rank, --uniform or --fold-rslora.")
    note = f"Changed by `python -m lora_one.adapters export`: {'; '.join(done)}."
    write_stored(adapter, options.out, note)
    print("\n".join([*done, f"written to {options.out}"]))
    return DONE


def _merge(options: argparse.Namespace) -> int:
    import warnings

    from lora_one.adapters.stored import read_stored

    adapter = read_stored(options.adapter)  # before transformers is imported
    from transformers.utils import logging

    from lora_one.adapters import merge_folder as merging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # no table of what is missing: the merge names it
    dtype = merging.DTYPES.get(options.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights, which the merge minds
        report = merging.merge_folder(adapter, options.out, base=options.base, dtype=dtype)
    tokenizer = f"tokenizer copied ({len(report.tokenizer)} files)"
    print(
        f"{report.layers} layers merged into {report.base}, in float32, and written to "
        f"{options.out} in {str(report.dtype).removeprefix('torch.')}; "
        f"{tokenizer if report.tokenizer else 'no tokenizer was there'}\n"
        f"read back, its logits on {merging.PROBE_ROWS} x {merging.PROBE_TOKENS} token ids (seed "
        f"0) differ from the base's with the adapter by {report.logit_difference:.1e} of the "
        "largest"
    )
    return DONE


def _push(options: argparse.Namespace) -> int:
    from lora_one.adapters.push import push
    from lora_one.adapters.stored import read_stored

    adapter = read_stored(options.adapter)
    if not (options.adapter / "README.md").is_file():
        print("note: there is no README.md, so its page will say nothing", file=sys.stderr)
    base = adapter.config.get("base_model_name_or_path")
    if base and Path(base).exists():
        print(f"note: its base model is a local folder, {base}", file=sys.stderr)
    print(push(adapter, options.repo_id, private=options.private))
    return DONE


def _check(options: argparse.Namespace) -> int:
    from lora_one.adapters.serving import check_llama_cpp, check_vllm, render
    from lora_one.adapters.stored import read_stored

    adapter = read_stored(options.adapter)
    checks = {"vllm": check_vllm, "llama.cpp": check_llama_cpp}
    chosen = [check for name, check in checks.items() if options.program in (None, name)]
    verdicts = [check(adapter) for check in chosen]
    print(render(verdicts))
    return FAILED if any(verdict.obstacles for verdict in verdicts) else DONE


def _say(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
