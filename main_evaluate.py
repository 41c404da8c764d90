"""The results table of one classifier: ImageNet and its robustness sets, or sets of your own. Commands: FINETUNE.md."""

import argparse
from pathlib import Path

import torch
from torch import nn

import models_vit
from util import cli, speed
from util.data import robustness, workers
from util.data.parts import parts_loader
from util.dist import init_distributed, on_main, shutdown
from util.errors import UserError
from util.log import log, setup_logging
from util.look import charts, results, tables
from util.look.records import Watch, evaluate
from util.run import exits
from util.step import autocast_dtype
from util.weights import build, checkpoint, download, hub


def get_args_parser() -> argparse.ArgumentParser:
    """All options, without --help."""
    parser = argparse.ArgumentParser("Evaluation of a classifier on many test sets", add_help=False)
    cli.add_model_options(parser, models_vit.MODELS, default="")
    parser.set_defaults(input_size=None)  # both as the file tells
    add = parser.add_argument_group("classifier").add_argument
    add("--resume", default="", type=cli.path, metavar="FILE",
        help="checkpoint: path, https URL or the name of a released file")  # fmt: skip
    add("--global_pool", action="store_true", default=None,
        help="classify the mean of the patch tokens (default: as the file tells)")  # fmt: skip
    add("--cls_token", action="store_false", dest="global_pool",
        help="classify the class token (default: as the file tells)")  # fmt: skip
    add("--classes", default=None, type=cli.path, metavar="FILE",
        help="class names, one a line in the order of the logits (default: as the checkpoint names them; 1,000 classes "
        "without names are ImageNet's)")  # fmt: skip

    add = parser.add_argument_group("sets, one at least").add_argument
    add("--imagenet", type=cli.path, metavar="FOLDER", help="val/<wnid>/ or the class folders themselves")
    add("--imagenet_real", type=cli.path, metavar="FILE",
        help="real.json, the labels of ReaL for the images of --imagenet")  # fmt: skip
    add("--imagenet_v2", type=cli.path, metavar="FOLDER", help="folders 0 to 999")
    add("--imagenet_a", type=cli.path, metavar="FOLDER",
        help="folders of the set's 200 wnids; these 200 logits are scored")  # fmt: skip
    add("--imagenet_r", type=cli.path, metavar="FOLDER",
        help="folders of the set's 200 wnids; these 200 logits are scored")  # fmt: skip
    add("--imagenet_sketch", type=cli.path, metavar="FOLDER", help="wnid folders")
    add("--imagenet_c", type=cli.path, metavar="FOLDER",
        help="<corruption>/<1 to 5>/<wnid>/, or the same below noise, blur, weather, digital, extra; no pixel is cut "
        "off, and none changed where the images have --input_size")  # fmt: skip
    add("--set", action="append", type=robustness.named_folder, metavar="NAME=FOLDER",
        help="folders named as the classifier's classes; their logits alone are scored; may be repeated")  # fmt: skip
    add("--skip_unknown_classes", action="store_true",
        help="leave out class folders that the set or the classifier does not know (else an error)")  # fmt: skip
    add("--skip_bad_images", action="store_true",
        help="leave out files that cannot be decoded, and count them (else an error)")  # fmt: skip

    add = parser.add_argument_group("results").add_argument
    add("--output_dir", default="./output_dir", type=cli.path, metavar="FOLDER",
        help="for results.json, .csv, .md and parts/; started again, the evaluation goes on there")  # fmt: skip
    add("--predictions", default="", type=cli.path, metavar="FILE",
        help="write each image's label and five best classes to a .csv or .parquet")  # fmt: skip
    add("--per_class", action="store_true",
        help="write per_class.csv, and confusion_SET.png for classifiers of up to 100 classes")  # fmt: skip

    add = parser.add_argument_group("run").add_argument
    add("--batch_size", default=64, type=cli.positive, metavar="N", help="images per process and forward pass")
    add("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
        help="precision of matrix products; auto: bf16 where the device computes in it, else fp16 on CUDA, else off "
        "(float32)")  # fmt: skip
    add("--compile", default="auto", choices=["auto", "on", "off"],
        help="compile the transformer blocks, in a first step that takes longer; auto: on CUDA")  # fmt: skip
    add("--device", default="auto", help="auto (the best of cuda, mps, cpu), cuda, mps or cpu")
    add("--num_workers", default=10, type=cli.count, metavar="N",
        help="loader workers per process; capped at the process's share of the cores")  # fmt: skip
    add("--loader_timeout", default=600.0, type=cli.not_negative, metavar="SECONDS",
        help="seconds a batch may take to load before the disk counts as stalled; 0 waits for ever")  # fmt: skip
    add("--pin_mem", action="store_true", default=True, help="page-locked memory for faster copies to a GPU")
    add("--no_pin_mem", action="store_false", dest="pin_mem", help="ordinary memory instead (default: page-locked)")
    add("--dist_timeout", default=10.0, type=cli.above_zero, metavar="MINUTES",
        help="minutes that a process waits for the others before it takes them for dead")  # fmt: skip
    add("--dist_url", default="env://", help="where processes meet; env:// takes the launcher's environment")
    return parser


def main(args: argparse.Namespace) -> None:
    """Evaluate as `args` says. Raises UserError for bad input before the first image."""
    env = init_distributed(args.device, args.dist_url, args.dist_timeout)
    if not args.output_dir:
        raise UserError("--output_dir is empty: name the folder of the results")
    setup_logging(env, args.output_dir)
    log.info(args)

    # sets
    own = args.set or []
    folders = {name: getattr(args, name.replace("-", "_")) for name in robustness.SETS}
    if not any(folders.values()) and not own:
        raise UserError("there is no set to evaluate: pass --imagenet FOLDER or another; --help lists them")
    if not all(own):  # what argparse makes of --set=--
        raise UserError("--set needs NAME=FOLDER: name the set and its folder")
    if len({name for name, _ in own}) < len(own):
        raise UserError("--set is given twice with one name: give each set a name of its own")
    if (real := folders.pop("imagenet-real")) and not args.imagenet:
        raise UserError(f"--imagenet_real {real} holds labels of ImageNet's validation images: pass --imagenet too")
    if args.predictions:
        tables.check_predictions(args.predictions)
    listed = robustness.list_sets(folders, own)

    # model
    name, model, classes, path = open_classifier(args)
    names = robustness.class_names(model.head.out_features, classes, args.classes)
    size = tuple(model.patch_embed.img_size)
    parts = robustness.to_parts(listed, names, size, real, args.skip_unknown_classes)
    dtype = autocast_dtype(args.amp, env.device)
    speed.choose_kernels(model, dtype, env.device)
    model.to(env.device).eval()
    speed.prepare(model, args.compile, grad_checkpointing=False, device=env.device)

    # what is done already
    md5 = on_main(env, lambda: results.md5_of(path))
    published = results.published_for(path.name, md5)
    md5 += checkpoint.AVERAGE * args.resume.endswith(checkpoint.AVERAGE)  # other weights of one file
    header = {
        "checkpoint": args.resume, "md5": md5, "model": name, "input_size": list(size),
        "precision": str(dtype or torch.float32).removeprefix("torch."), "versions": results.versions(),
    }  # fmt: skip
    table = None

    def open_table() -> list[int]:
        nonlocal table
        table = results.Results(args.output_dir, header, published)
        return table.missing(parts)

    todo = [parts[i] for i in on_main(env, open_table)]
    log.info(
        f"{len(parts)} parts, {len(parts) - len(todo)} of them done; {sum(len(p.files) for p in todo)} images to go"
    )

    # evaluation
    num_workers = workers.available_workers(args.num_workers, env)
    loader, n_batches = parts_loader(
        todo, args.batch_size, env, args.skip_bad_images, num_workers, args.pin_mem, args.loader_timeout
    )
    watch = Watch(sum(n_batches), env)
    batches = watch.batches(loader)
    full = args.batch_size if args.compile == "on" or (args.compile == "auto" and env.device.type == "cuda") else 0
    for done, (part, n) in enumerate(zip(todo, n_batches, strict=True), 1):
        try:
            record, skipped = evaluate(model, part, batches, n, env, dtype, full)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--batch_size {args.batch_size} does not fit into the device's memory: halve it"
            ) from error
        on_main(env, lambda: table.add(part, record, skipped))  # noqa: B023
        watch.tell(f"[{done}/{len(todo)}] {part.key}: {len(record['index'])} images")
    watch.close()
    on_main(env, lambda: finish(table, parts, names, args))
    shutdown()


def open_classifier(args: argparse.Namespace) -> tuple[str, nn.Module, object, Path]:
    """--resume -> name of the model, the classifier, its class names where the file has them, the file's path."""
    if not args.resume:
        raise UserError("--resume is not given: name the classifier's checkpoint, such as mae_finetuned_vit_base.pth")
    place = build.find(args.resume)
    name, model = build.open_named(args.resume, args.model, args.input_size)
    if not isinstance(getattr(model, "head", None), nn.Linear):
        raise UserError(f"{args.resume} holds no classifier, but {name} without a head: fine-tune or probe it first")
    pooled = bool(model.global_pool)
    if args.global_pool not in (None, pooled):
        wanted, other = ("--global_pool", "--cls_token")[:: 1 if args.global_pool else -1]
        raise UserError(f"{wanted}: {args.resume} was trained with {other}: leave the option out")
    place = str(hub.local(place.removesuffix(checkpoint.AVERAGE)))
    path = download.fetch(place) if place.startswith("https://") else Path(place)
    return name, model, model.classes, path


def finish(table: results.Results, parts: list[robustness.Part], names: list[str], args: argparse.Namespace) -> None:
    """Write what is made of the whole: the table, pictures, predictions; and show the table."""
    table.write_table()
    content = table.table()
    if "imagenet-c" in content["sets"]:
        table.write("results_c.png", charts.corruption_chart(content["sets"]["imagenet-c"]).save)
    if args.predictions:
        rows = ((part, table.record(part)) for part in parts)
        table.write(Path(args.predictions).absolute(), lambda path: tables.write_predictions(path, rows, names))
    if args.per_class:
        counts = {}
        for name in dict.fromkeys(part.set for part in parts):
            labels, answers = tables.answers([(part, table.record(part)) for part in parts if part.set == name])
            counts[name] = tables.per_class(labels, answers, len(names))
            if len(names) <= 100:
                matrix = tables.confusion(labels, answers, len(names))
                table.write(f"confusion_{name}.png", charts.confusion_chart(matrix, names).save)
        table.write("per_class.csv", tables.per_class_csv(counts, names))
    table.close()
    log.info("\n" + tables.as_text(content))


if __name__ == "__main__":
    exits.run(main, cli.parse(get_args_parser(), __doc__))
