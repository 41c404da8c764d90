"""Linear probing: a linear classifier on frozen features, and evaluation of one. Recipes: FINETUNE.md."""

import argparse

from timm.layers import trunc_normal_
from torch import nn

import models_vit
from engine_finetune import evaluate, evaluate_and_leave, train_one_epoch
from util import cli, flops, rng, speed
from util.data.datasets import bad_listed
from util.data.loader import open_labelled
from util.dist import shutdown, wrap
from util.errors import UserError
from util.lars import LARS
from util.log import log
from util.lr_sched import Schedule, scaled_lr
from util.run import exits
from util.run.resume import will_resume
from util.run.run import Run
from util.run.start import begin
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
    cli.add_channel_options(parser)
    cli.add_data_options(parser, "folder with train/<class>/ and val/<class>/")
    cli.add_run_options(parser, save_every=1)
    return parser


def main(args: argparse.Namespace) -> None:
    """Probe, or with --eval evaluate, as `args` says. Raises UserError for bad input before the first step."""
    env = begin(args, get_args_parser())
    if args.eval:  # model, size, classes and pooling are the file's
        weights = build.take_options(args, get_args_parser(), probe=True)

    # data: crop and flip alone. Regularisation hurts a linear classifier: no mixup, no RandAugment (appendix A.1)
    if args.batch_size == 1 and not args.eval:
        raise UserError("--batch_size 1: batch normalisation needs two images or more in each process: pass 2 or more")
    crop = (args.crop_min, args.hflip, args.crop_ratio)
    train_transform = None if args.eval else linprobe_transform(args.input_size, *crop)
    data = open_labelled(
        cli.data_options(args), (train_transform, eval_transform(args.input_size)), nb_classes=args.nb_classes,
        batch_size=args.batch_size, accum_iter=args.accum_iter, env=env, seed=args.seed, sharded=args.dist_eval,
    )  # fmt: skip
    data.val_set.bands.note(args)

    # model: everything frozen but the head
    rng.seed_init(args.seed)  # the same weights on all ranks
    model = models_vit.MODELS[args.model](
        img_size=args.input_size, in_chans=args.in_chans, num_classes=args.nb_classes, global_pool=args.global_pool
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
        return evaluate_and_leave(model, weights, args.resume, data, env, dtype, args.dist_eval)
    model.to(env.device)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(f"{args.model}: {n_parameters:,} trainable parameters")
    speed.prepare(model, args.compile, args.grad_checkpointing, env.device)
    ddp_model = wrap(model, env)

    # optimizer: LARS, for batches of 16,384 (table 10), and no weight decay
    lr = scaled_lr(args.lr, args.blr, args.batch_size * args.accum_iter * env.world_size)
    schedule = Schedule(lr, args.min_lr, args.warmup_epochs, args.epochs)
    # the head alone; BatchNorm has no parameters, and its statistics follow the batches of training
    optimizer = LARS(model.head.parameters(), lr=lr, weight_decay=args.weight_decay)
    step = Step(ddp_model, optimizer, env.device, dtype, args.accum_iter)
    criterion = nn.CrossEntropyLoss()  # no smoothing either

    # training
    told = {"n_images": len(data.train_set), "images": data.train_set.digest(), "classes": data.val_set.classes}
    run = Run(env, args, model, step, forward_macs=flops.classifier_macs(model), frozen=1, **told)
    with bad_listed(data.train_set, data.val_set), run:
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.done.iteration)
            train_stats = train_one_epoch(
                ddp_model, criterion, data.train_loader, step, schedule, epoch, run, seed=args.seed
            )
            data.report_bad()  # now: a signal may end the evaluation
            test_stats = evaluate(model, data.val_loader, env, dtype, args.dist_eval, run)
            data.report_bad()
            run.after_epoch(epoch, train_stats, test_stats)
    shutdown()


if __name__ == "__main__":
    exits.run(main, cli.parse(get_args_parser(), __doc__))
