"""The results table of one classifier: ImageNet and its robustness sets, or sets of your own. Commands: FINETUNE.md."""

import argparse
from pathlib import Path

import torch
from torch import nn

import models_vit
from util import cli, options, speed
from util.data import robustness, workers
from util.data.bands import of_model
from util.data.parts import parts_loader, to_parts
from util.dist import check_ranks_agree, on_main, shutdown
from util.errors import UserError
from util.log import log
from util.look import results, tables
from util.look.records import Watch, evaluate
from util.run import exits
from util.run.start import begin
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

    cli.add_statistics_options(add, "as the file tells")
    robustness.add_set_options(parser)
    add = parser.add_argument_group("results").add_argument
    add("--output_dir", default="./output_dir", type=cli.path, metavar="FOLDER",
        help="for results.json, .csv, .md and parts/; started again, the evaluation goes on there")  # fmt: skip
    add("--predictions", default="", type=cli.path, metavar="FILE",
        help="write each image's label and five best classes to a .csv or .parquet")  # fmt: skip
    add("--per_class", action="store_true",
        help="write per_class.csv, and confusion_SET.png for classifiers of up to 100 classes")  # fmt: skip

    cli.add_evaluation_options(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Evaluate as `args` says. Raises UserError for bad input before the first image."""
    if not args.resume:
        raise UserError("--resume is not given: name the classifier's checkpoint, such as mae_finetuned_vit_base.pth")
    if not args.output_dir:
        raise UserError("--output_dir is empty: name the folder of the results")
    env = begin(args, get_args_parser())

    # what is asked for, and the model
    folders, own = robustness.given_sets(args)
    if args.predictions:
        tables.check_predictions(args.predictions)
    name, model, classes, path = open_classifier(args)
    bands = of_model(model, args.mean, args.std)

    # sets
    listed = robustness.list_sets(folders, own, bands.endings)
    names = robustness.class_names(model.head.out_features, classes, args.classes)
    size = tuple(model.patch_embed.img_size)
    parts = to_parts(listed, names, size, folders["imagenet-real"], args.skip_unknown_classes)
    check_ranks_agree(env, {part.key: part.fingerprint for part in parts})
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
    table = results.Results(env, args.output_dir, header, published)
    on_main(env, lambda: options.write(args, args.output_dir))
    todo = table.missing(parts)
    log.info(
        f"{len(parts)} parts, {len(parts) - len(todo)} of them done; {sum(len(p.files) for p in todo)} images to go"
    )

    # evaluation: one loader over all parts
    num_workers = workers.available_workers(args.num_workers, env)
    loader, n_batches = parts_loader(
        todo, args.batch_size, env, args.skip_bad_images, num_workers, args.pin_mem, args.loader_timeout, bands
    )
    watch = Watch(sum(n_batches), env)
    batches = watch.batches(loader)
    full = args.batch_size if args.compile == "on" or (args.compile == "auto" and env.device.type == "cuda") else 0
    for done, (part, n) in enumerate(zip(todo, n_batches, strict=True), 1):
        record, skipped = evaluate(model, part, batches, n, env, dtype, full)
        table.add(part, record, skipped)
        watch.tell(f"[{done}/{len(todo)}] {part.key}: {len(record['index'])} images")
    watch.close()
    table.finish(parts, names, args.predictions, args.per_class)
    shutdown()


def open_classifier(args: argparse.Namespace) -> tuple[str, nn.Module, object, Path]:
    """--resume -> name of the model, the classifier, its class names where the file has them, the file's path."""
    name, model = build.open_named(args.resume, args.model, args.input_size)
    if not isinstance(getattr(model, "head", None), nn.Linear):
        raise UserError(f"{args.resume} holds no classifier, but {name} without a head: fine-tune or probe it first")
    pooled = bool(model.global_pool)
    if args.global_pool not in (None, pooled):
        wanted, other = ("--global_pool", "--cls_token")[:: 1 if args.global_pool else -1]
        raise UserError(f"{wanted}: {args.resume} was trained with {other}: leave the option out")
    place = str(hub.local(args.resume.removesuffix(checkpoint.AVERAGE)))
    path = download.fetch(place) if place.startswith("https://") else Path(place)
    return name, model, model.classes, path


if __name__ == "__main__":
    exits.run(main, cli.parse(get_args_parser(), __doc__))
