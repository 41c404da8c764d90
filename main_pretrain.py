"""Masked pretraining on a folder of images: python main_pretrain.py --data_path FOLDER. Recipes: PRETRAIN.md."""

import argparse

import torch
from timm.optim import param_groups_weight_decay

import models_mae
from engine_pretrain import train_one_epoch
from util import cli, flops, rng, speed
from util.data import datasets, loader, readers, workers
from util.dist import check_ranks_agree, shutdown, wrap
from util.log import log
from util.look.watch import Watch
from util.lr_sched import Schedule, scaled_lr
from util.run import exits
from util.run.run import Run, begin
from util.step import Step, autocast_dtype
from util.transforms import pretrain_transform


def get_args_parser() -> argparse.ArgumentParser:
    """All options, without --help, so that submitit_pretrain.py can take the parser as a parent."""
    parser = argparse.ArgumentParser("MAE pre-training", add_help=False)
    # defaults: the original's; the published recipe is in PRETRAIN.md
    cli.add_training_options(
        parser, batch_size=64, epochs=400, blr=1e-3, min_lr=0.0, warmup_epochs=40, weight_decay=0.05
    )
    cli.add_model_options(parser, models_mae.MODELS, default="mae_vit_large_patch16")
    mae = parser.add_argument_group("masked autoencoding")
    mae.add_argument("--mask_ratio", default=0.75, type=cli.mask_ratio, help="share of patches removed")
    mae.add_argument("--norm_pix_loss", action="store_true", help="predict pixels normalised per patch")
    cli.add_crop_options(parser, crop_min=0.2)
    cli.add_data_options(
        parser, "folder of images: its train/ if it has one, else all images below it, at any depth", labelled=False
    )
    cli.add_watch_options(parser)
    cli.add_run_options(parser, save_every=20)
    return parser


def main(args: argparse.Namespace) -> None:
    """Pretrain as `args` says. Raises UserError for bad input before the first step."""
    env = begin(args)

    # data
    transform = pretrain_transform(args.input_size, args.crop_min, args.hflip)
    dataset = readers.pretraining_images(
        args.data_path, args.dataset, args.train_split, transform, env, args.seed, args.skip_bad_images
    )
    check_ranks_agree(env, {"training images": dataset.digest()})
    sampler = datasets.TrainSampler(len(dataset), args.batch_size, args.accum_iter, env, args.seed)
    num_workers = workers.available_workers(args.num_workers, env)
    train_loader = loader.train_loader(dataset, sampler, num_workers, args.pin_mem, args.decode, args.loader_timeout)
    folder = None if args.dataset else args.data_path
    watch = Watch(
        env, folder, dataset, args.input_size, mask_ratio=args.mask_ratio, amp=args.amp,
        picture_every=args.picture_every, knn_every=args.knn_every, num_workers=num_workers,
    )  # fmt: skip
    log.info(f"{len(dataset)} training images, {len(train_loader)} batches an epoch")

    # model
    rng.seed_init(args.seed)
    model = models_mae.MODELS[args.model](img_size=args.input_size, norm_pix_loss=args.norm_pix_loss)
    models_mae.check_mask_ratio(model.patch_embed.num_patches, args.mask_ratio)
    model.to(env.device)
    log.info(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    speed.prepare(model, args.compile, args.grad_checkpointing, env.device)
    ddp_model = wrap(model, env)

    # optimizer: no decay on biases and norms; betas from the paper's table 8
    lr = scaled_lr(args.lr, args.blr, args.batch_size * args.accum_iter * env.world_size)
    schedule = Schedule(lr, args.min_lr, args.warmup_epochs, args.epochs)
    groups = param_groups_weight_decay(model, args.weight_decay)
    # fused, it leaves out gradients that are not finite; on mps not with every torch (pytorch pull request 186360)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=env.device.type != "mps")
    dtype = autocast_dtype(args.amp, env.device)
    speed.choose_kernels(model, dtype, env.device)
    step = Step(ddp_model, optimizer, env.device, dtype, args.accum_iter)
    n_kept = models_mae.kept_patches(model.patch_embed.num_patches, args.mask_ratio)
    macs = sum(flops.pretrain_macs(model, n_kept))

    # training
    with Run(env, args, model, step, n_images=len(dataset), forward_macs=macs, milestones=20) as run:
        for epoch in run.epochs():
            sampler.set_epoch(epoch, run.done.iteration)
            stats = train_one_epoch(
                ddp_model, train_loader, step, schedule, epoch, run, mask_ratio=args.mask_ratio, seed=args.seed
            )
            datasets.report_bad(dataset)
            run.after_epoch(epoch, stats)  # saved first, looked at afterwards
            run.log.add_to_last(watch.after_epoch(epoch, model, stats["loss"], run.log))
    shutdown()


if __name__ == "__main__":
    exits.run(main, cli.parse(get_args_parser(), __doc__))
