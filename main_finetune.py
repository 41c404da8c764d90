"""Fine-tuning a classifier from pretrained weights, and evaluation of one. Recipes: FINETUNE.md."""

import argparse

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import trunc_normal_
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn

import models_vit
from engine_finetune import evaluate, evaluate_and_leave, train_one_epoch
from util import cli, flops, rng, speed
from util.data.datasets import bad_listed
from util.data.loader import open_labelled
from util.dist import shutdown, wrap
from util.errors import UserError
from util.log import log
from util.lr_decay import param_groups_lrd
from util.lr_sched import Schedule, scaled_lr
from util.run import exits
from util.run.resume import will_resume
from util.run.run import Run
from util.run.start import begin
from util.step import Step, autocast_dtype
from util.transforms import eval_transform, finetune_transform
from util.weights import build, checkpoint


def get_args_parser() -> argparse.ArgumentParser:
    """All options, without --help, so that submitit_finetune.py can take the parser as a parent."""
    parser = argparse.ArgumentParser("MAE fine-tuning for image classification", add_help=False)
    # defaults: the original's; the published recipes are in FINETUNE.md
    cli.add_training_options(
        parser, batch_size=64, epochs=50, blr=1e-3, min_lr=1e-6, warmup_epochs=5, weight_decay=0.05
    )
    cli.add_model_options(parser, models_vit.MODELS, default="vit_large_patch16")
    cli.add_classifier_options(parser, global_pool=True)

    add = parser.add_argument_group("regularisation").add_argument
    add("--drop_path", default=0.1, type=cli.share,
        help="stochastic depth of the last block; linear from 0 at the first")  # fmt: skip
    add("--clip_grad", default=None, type=cli.above_zero, metavar="NORM", help="maximum gradient norm")
    add("--layer_decay", default=0.75, type=cli.above_zero,
        help="learning rate of a layer over that of the one above it")  # fmt: skip
    add("--tune_blocks", default="all", type=cli.tuned_blocks, metavar="N",
        help="train the last N blocks, the norm behind them and the head; 0.5: the MLP half of the last block; 0: the "
        "head alone; all: everything. The rest gets no gradient, weight decay or stochastic depth")  # fmt: skip
    add("--opt_betas", default=[0.9, 0.999], type=cli.share_below_1, nargs=2, metavar=("B1", "B2"),
        help="AdamW's decay of the mean gradient and of its square, per step")  # fmt: skip
    add("--model_ema", default=None, type=cli.share_below_1, metavar="DECAY",
        help="average the weights: DECAY x average + (1 - DECAY) x weights after each optimizer step; evaluated and "
        "saved beside them. Costs a copy of the model and a pass over it a step. none: no average")  # fmt: skip
    add("--smoothing", default=0.1, type=cli.share_below_1,
        help="label smoothing: share of the target spread over all classes")  # fmt: skip

    add = cli.add_crop_options(parser, crop_min=0.08)
    add("--color_jitter", default=None, type=cli.not_negative, help="strength of colour jitter; used only without --aa")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's auto-augment string; '' for none")
    add("--reprob", default=0.25, type=cli.share, help="random erasing: share of images")
    add("--remode", default="pixel", choices=["const", "rand", "pixel"], help="random erasing: what fills the box")
    add("--recount", default=1, type=cli.positive, help="random erasing: boxes an image")
    add("--resplit", action="store_true", help="accepted for old command lines; no effect")
    add("--mixup", default=0.0, type=cli.not_negative, help="mixup's alpha; 0 for none")
    add("--cutmix", default=0.0, type=cli.not_negative, help="cutmix's alpha; 0 for none")
    add("--cutmix_minmax", default=None, type=cli.share, nargs=2, metavar=("MIN", "MAX"),
        help="cutmix's least and largest share of a side; overrides --cutmix")  # fmt: skip
    add("--mixup_prob", default=1.0, type=cli.share, help="share of batches that are mixed")
    add("--mixup_switch_prob", default=0.5, type=cli.share, help="share of cutmix where both are on")
    add("--mixup_mode", default="batch", choices=["batch", "pair", "elem"], help="one draw for a batch, pair or image")

    cli.add_channel_options(parser)
    cli.add_data_options(parser, "folder with train/<class>/ and val/<class>/")
    cli.add_run_options(parser, save_every=1)
    return parser


def main(args: argparse.Namespace) -> None:
    """Fine-tune, or with --eval evaluate, as `args` says. Raises UserError for bad input before the first step."""
    env = begin(args, get_args_parser())
    if args.eval:  # model, size, classes and pooling are the file's
        weights = build.take_options(args, get_args_parser(), probe=False)

    # data: RandAugment and erasing change one image, mixup and cutmix two (table 9); a classifier overfits without them
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if args.cutmix_minmax is not None and not args.cutmix_minmax[0] < args.cutmix_minmax[1]:
        raise UserError(f"--cutmix_minmax {args.cutmix_minmax}: the first number must be below the second")
    if mixes and args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size} is odd, but mixup and cutmix mix pairs: choose an even one")
    crop = (args.crop_min, args.hflip, args.crop_ratio)
    train_transform = None if args.eval else finetune_transform(args.input_size, args.color_jitter, args.aa, *crop)
    data = open_labelled(
        cli.data_options(args), (train_transform, eval_transform(args.input_size)), nb_classes=args.nb_classes,
        batch_size=args.batch_size, accum_iter=args.accum_iter, env=env, seed=args.seed, sharded=args.dist_eval,
    )  # fmt: skip
    data.val_set.bands.note(args)

    # model
    rng.seed_init(args.seed)  # the same weights on all ranks
    model = models_vit.MODELS[args.model](
        img_size=args.input_size,
        in_chans=args.in_chans,
        num_classes=args.nb_classes,
        drop_path_rate=args.drop_path,  # larger models take more (FINETUNE.md)
        global_pool=args.global_pool,
    )
    dtype = autocast_dtype(args.amp, env.device)
    speed.choose_kernels(model, dtype, env.device)
    if args.eval:
        return evaluate_and_leave(model, weights, args.resume, data, env, dtype, args.dist_eval)
    if args.finetune and not will_resume(env, args):  # a run that goes on brings all its weights
        # a small head starts from near-uniform predictions, so the first steps don't shake the backbone
        trunc_normal_(model.head.weight, std=2e-5)
        checkpoint.load_pretrained(args.finetune, model)
    # every start passes here, a resumed one too: the place to freeze by hand, with requires_grad_(False)
    if args.tune_blocks is not None:
        models_vit.freeze_all_but_last(model, args.tune_blocks)
    model.to(env.device)
    n_parameters, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad in of) for of in ([0, 1], [0]))
    log.info(f"{args.model}: {n_parameters:,} parameters" + (f", {frozen:,} of them frozen" if frozen else ""))
    # made before the model is compiled and wrapped: the average is a plain copy of it (from scratch, table 11)
    average = None if args.model_ema is None else ModelEmaV3(model, args.model_ema)
    speed.prepare(model, args.compile, args.grad_checkpointing, env.device)
    ddp_model = wrap(model, env)

    erase = None  # done on the device, by the engine
    if args.reprob > 0:
        erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=str(env.device))

    # loss: with mixing, the targets are soft and Mixup has smoothed them already
    mixup = criterion = None
    if mixes:
        mixup = Mixup(
            args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
            label_smoothing=args.smoothing, num_classes=args.nb_classes,
        )  # fmt: skip
        criterion = SoftTargetCrossEntropy()
    else:
        criterion = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing > 0 else nn.CrossEntropyLoss()

    # optimizer: lr = blr x effective batch / 256 (appendix A.1); the least rate is absolute
    lr = scaled_lr(args.lr, args.blr, args.batch_size * args.accum_iter * env.world_size)
    schedule = Schedule(lr, args.min_lr, args.warmup_epochs, args.epochs)
    # lower layers learn more slowly: what they know is general, and is to be kept (layer-wise decay, table 9)
    groups = param_groups_lrd(model, args.weight_decay, model.no_weight_decay(), args.layer_decay)
    # fused, it leaves out gradients that are not finite; on mps not with every torch (pytorch pull request 186360)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=tuple(args.opt_betas), fused=env.device.type != "mps")
    step = Step(ddp_model, optimizer, env.device, dtype, args.accum_iter, args.clip_grad, average)

    # training
    told = {"n_images": len(data.train_set), "images": data.train_set.digest(), "classes": data.val_set.classes}
    macs, frozen = flops.classifier_macs(model), flops.frozen_share(model)
    run = Run(env, args, model, step, forward_macs=macs, frozen=frozen, **told)
    with bad_listed(data.train_set, data.val_set), run:
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.done.iteration)
            train_stats = train_one_epoch(
                ddp_model, criterion, data.train_loader, step, schedule, epoch, run,
                erase=erase, mixup=mixup, seed=args.seed,
            )  # fmt: skip
            data.report_bad()  # now: a signal may end the evaluation
            test_stats = evaluate(model, data.val_loader, env, dtype, args.dist_eval, run)
            if average:
                log.info("The average of the weights (--model_ema):")
                of_average = evaluate(average.module, data.val_loader, env, dtype, args.dist_eval, run)
                test_stats |= {f"{name}_ema": value for name, value in of_average.items()}
            data.report_bad()
            run.after_epoch(epoch, train_stats, test_stats)
    shutdown()


if __name__ == "__main__":
    exits.run(main, cli.parse(get_args_parser(), __doc__))
