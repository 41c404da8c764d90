"""Linear probing: a linear classifier on frozen features, and evaluation of one. Recipes: FINETUNE.md."""

import argparse

from timm.layers import trunc_normal_
from torch import nn

import models_vit
from engine_finetune import evaluate, train_one_epoch
from util import cli, flops, rng, speed
from util.data import datasets, loader, readers, workers
from util.dist import check_ranks_agree, shutdown, wrap
from util.errors import UserError
from util.lars import LARS
from util.log import log
from util.lr_sched import Schedule, scaled_lr
from util.run import exits
from util.run.resume import will_resume
from util.run.run import Run, begin
from util.step import Step, autocast_dtype
from util.transforms import eval_transform, linprobe_transform
from util.weights import build, checkpoint


def get_args_parser() -> argparse.ArgumentParser:
    """All options, without --help, so that submitit_linprobe.py can take the parser as a parent."""
    parser = argparse.ArgumentParser("MAE linear probing for image classification", add_help=False)
    cli.add_training_options(parser, batch_size=512, epochs=90, blr=0.1, min_lr=0.0, warmup_epochs=10, weight_decay=0)
    cli.add_model_options(parser, models_vit.MODELS, default="vit_large_patch16")
    cli.add_classifier_options(parser, global_pool=False)
    cli.add_crop_options(parser, crop_min=0.08)
    cli.add_data_options(parser, "folder with train/<class>/ and val/<class>/")
    cli.add_run_options(parser, save_every=1)
    return parser


def main(args: argparse.Namespace) -> None:
    """Probe, or with --eval evaluate, as `args` says. Raises UserError for bad input before the first step."""
    env = begin(args)
    if args.eval:  # model, size, classes and pooling are the file's
        weights = build.take_options(args, get_args_parser(), probe=True)

    # data
    if args.batch_size == 1 and not args.eval:
        raise UserError("--batch_size 1: batch normalisation needs two images or more in each process: pass 2 or more")
    train_transform = None if args.eval else linprobe_transform(args.input_size, args.crop_min, args.hflip)
    train_set, val_set = readers.labelled_images(
        args.data_path, args.dataset, (args.train_split, args.val_split),
        (train_transform, eval_transform(args.input_size)),
        args.nb_classes, env, args.dist_eval, args.seed, args.skip_bad_images,
    )  # fmt: skip
    check_ranks_agree(env, {"images": [images and images.digest() for images in (train_set, val_set)]})
    num_workers = workers.available_workers(args.num_workers, env)
    val_loader = loader.eval_loader(
        val_set, args.batch_size, env, args.dist_eval, num_workers, args.pin_mem, args.loader_timeout
    )
    if not args.eval:
        sampler = datasets.TrainSampler(len(train_set), args.batch_size, args.accum_iter, env, args.seed)
        train_loader = loader.train_loader(
            train_set, sampler, num_workers, args.pin_mem, args.decode, args.loader_timeout
        )
        log.info(f"{len(train_set)} images to train, {len(val_set)} to validate, {len(train_loader)} batches an epoch")

    # model: everything frozen but the head
    rng.seed_init(args.seed)
    model = models_vit.MODELS[args.model](
        img_size=args.input_size, num_classes=args.nb_classes, global_pool=args.global_pool
    )
    if args.finetune and not args.eval and not will_resume(env, args):
        checkpoint.load_pretrained(args.finetune, model)
    trunc_normal_(model.head.weight, std=0.01)  # as MoCo v3's probe; a head in the checkpoint is not used
    nn.init.zeros_(model.head.bias)
    # features of a pretrained encoder differ in scale: normalise them without affine parameters (paper, appendix A.1)
    norm = nn.BatchNorm1d(model.head.in_features, affine=False, eps=models_vit.PROBE_EPS)
    model.head = nn.Sequential(norm, model.head)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    dtype = autocast_dtype(args.amp, env.device)
    speed.choose_kernels(model, dtype, env.device)
    if args.eval:
        checkpoint.load_strictly(model, weights, args.resume)
        evaluate(model.to(env.device), val_loader, env, dtype, args.dist_eval)
        datasets.report_bad(val_set)
        shutdown()
        return
    model.to(env.device)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(f"{args.model}: {n_parameters:,} trainable parameters")
    speed.prepare(model, args.compile, args.grad_checkpointing, env.device)
    ddp_model = wrap(model, env)

    # optimizer
    lr = scaled_lr(args.lr, args.blr, args.batch_size * args.accum_iter * env.world_size)
    schedule = Schedule(lr, args.min_lr, args.warmup_epochs, args.epochs)
    optimizer = LARS(model.head.parameters(), lr=lr, weight_decay=args.weight_decay)
    step = Step(ddp_model, optimizer, env.device, dtype, args.accum_iter)
    criterion = nn.CrossEntropyLoss()

    # training
    macs = flops.classifier_macs(model)
    with Run(
        env, args, model, step, n_images=len(train_set), forward_macs=macs, frozen=True, classes=val_set.classes
    ) as run:
        for epoch in run.epochs():
            sampler.set_epoch(epoch, run.done.iteration)
            train_stats = train_one_epoch(
                ddp_model, criterion, train_loader, step, schedule, epoch, run, seed=args.seed
            )
            datasets.report_bad(train_set)
            test_stats = evaluate(model, val_loader, env, dtype, args.dist_eval, run)
            datasets.report_bad(val_set)
            run.after_epoch(epoch, train_stats, test_stats)
    shutdown()


if __name__ == "__main__":
    exits.run(main, cli.parse(get_args_parser(), __doc__))
