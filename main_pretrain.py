"""Masked pretraining on a folder of images: python main_pretrain.py --data_path FOLDER. Recipes: PRETRAIN.md."""

import argparse

import torch
from timm.optim import param_groups_weight_decay

import models_mae
from engine_pretrain import train_one_epoch
from util import cli, flops, masks, rng, speed, targets
from util.data import datasets, loader, measure, readers, workers
from util.dist import check_ranks_agree, on_main, share_buffers, shutdown, wrap
from util.log import log
from util.look.watch import Watch
from util.lr_sched import Schedule, scaled_lr
from util.run import exits
from util.run.resume import will_resume
from util.run.run import Run
from util.run.start import begin
from util.step import Step, autocast_dtype
from util.transforms import pretrain_transform
from util.weights import checkpoint


def get_args_parser() -> argparse.ArgumentParser:
    """All options, without --help, so that submitit_pretrain.py can take the parser as a parent."""
    parser = argparse.ArgumentParser("MAE pre-training", add_help=False)
    # defaults: the original's; the published recipe is in PRETRAIN.md
    cli.add_training_options(
        parser, batch_size=64, epochs=400, blr=1e-3, min_lr=0.0, warmup_epochs=40, weight_decay=0.05
    )
    cli.add_model_options(parser, models_mae.MODELS, default="mae_vit_large_patch16")
    mae = parser.add_argument_group("masked autoencoding")
    # fine-tuning and linear probing both do well at 0.75 (figure 5); less is easier to guess and costs more arithmetic
    mae.add_argument("--mask_ratio", default=0.75, type=cli.mask_ratio, help="share of patches removed")
    mae.add_argument("--norm_pix_loss", action="store_true", help="predict pixels normalised per patch: --target norm")
    cli.add_variant_options(parser)
    cli.add_crop_options(parser, crop_min=0.2)
    cli.add_channel_options(parser)
    cli.add_data_options(
        parser, "folder of images: its train/ if it has one, else all images below it, at any depth", labelled=False
    )
    cli.add_watch_options(parser)
    cli.add_run_options(parser, save_every=20)
    return parser


def build_model(args: argparse.Namespace, device: torch.device) -> models_mae.MaskedAutoencoderViT:
    """The model, on the CPU, with its decoder, mask strategy and target. Raises UserError for what does not fit it."""
    # the decoder serves pretraining alone, so its size is free of the encoder's (section 3, "MAE decoder")
    decoder = dict(
        decoder_embed_dim=args.decoder_width, decoder_depth=args.decoder_depth, decoder_num_heads=args.decoder_heads
    )
    options = {name: value for name, value in decoder.items() if value is not None}  # None leaves the model's own
    if args.encoder_mask_tokens:
        options["encoder_mask_tokens"] = True
    model = models_mae.MODELS[args.model](
        img_size=args.input_size, in_chans=args.in_chans, norm_pix_loss=args.norm_pix_loss, **options
    )
    models_mae.check_mask_ratio(model.patch_embed.num_patches, args.mask_ratio)
    if args.mask != "random":  # the default is what the model's file says
        model.mask_noise = masks.MASKS[args.mask]
        model.mask_noise(1, model.patch_embed.grid_size, args.mask_ratio, torch.device("cpu"))  # refuses at once
    if args.target not in ("pixel", "norm"):
        chosen = (args.pca_components, args.tokenizer, args.vocab_size)
        model.set_target(targets.for_model(args.target, model, device, *chosen))
    return model


def main(args: argparse.Namespace) -> None:
    """Pretrain as `args` says. Raises UserError for bad input before the first step."""
    args.target = targets.chosen(
        args.target, args.norm_pix_loss, pca_components=("pca", args.pca_components),
        tokenizer=("tokens", args.tokenizer), vocab_size=("tokens", args.vocab_size),
    )  # fmt: skip
    args.norm_pix_loss = args.target == "norm"
    env = begin(args, get_args_parser())

    # data: a random resized crop and a flip are all; the masks vary the task enough without colour jitter (table 1e)
    transform = pretrain_transform(args.input_size, args.crop_min, args.hflip, args.augment, args.crop_ratio)
    of_images = measure.chosen(args, transform)  # channels, type of values, mean and deviation
    dataset = readers.pretraining_images(
        args.data_path, args.dataset, args.train_split, transform, env, args.seed, args.skip_bad_images,
        of_images.endings,
    )  # fmt: skip
    check_ranks_agree(env, {"training images": dataset.digest()})  # each rank has listed its own disk
    measure.settle(of_images, env, args.decode, dataset).note(args)  # what is not given is measured
    # the order is a function of (seed, epoch): a run that goes on within an epoch reads nothing of what it has seen
    sampler = datasets.TrainSampler(len(dataset), args.batch_size, args.accum_iter, env, args.seed)
    num_workers = workers.available_workers(args.num_workers, env)
    train_loader = loader.train_loader(dataset, sampler, num_workers, args.pin_mem, args.decode, args.loader_timeout)
    watch = Watch(
        env, args.data_path, dataset, args.input_size, name=args.dataset, val_path=args.val_path, amp=args.amp,
        mask_ratio=args.mask_ratio, picture_every=args.picture_every, knn_every=args.knn_every, num_workers=num_workers,
    )  # fmt: skip
    log.info(f"{len(dataset)} training images, {len(train_loader)} batches an epoch")

    # model
    rng.seed_init(args.seed)  # the same weights on all ranks, made on the CPU so that they don't depend on the device
    model, starts = build_model(args, env.device), not will_resume(env, args)
    if args.init and starts:  # a run that goes on brings all its weights
        checkpoint.load_init(args.init, model)
    model.to(env.device)
    target = getattr(model, "decoder_target", None)
    if hasattr(target, "prepare") and starts:  # PCA: fitted once, on rank 0, and kept in the checkpoint
        on_main(env, lambda: target.prepare(targets.sample_patches(model, train_loader)))
        share_buffers(model)
    log.info(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters")
    # blocks are compiled one by one: they are alike, so one compilation serves all of them
    speed.prepare(model, args.compile, args.grad_checkpointing, env.device)
    ddp_model = wrap(model, env)

    # optimizer: lr = blr x effective batch / 256, the linear scaling rule (Goyal et al. 2017; appendix A.1)
    lr = scaled_lr(args.lr, args.blr, args.batch_size * args.accum_iter * env.world_size)
    schedule = Schedule(lr, args.min_lr, args.warmup_epochs, args.epochs)
    # no decay on biases and norms, which are one-dimensional; the class and mask tokens are decayed
    groups = param_groups_weight_decay(model, args.weight_decay)
    # betas from table 8, where the paper follows iGPT (Chen et al. 2020); no clipping of gradients (appendix A.1).
    # Fused, it leaves out gradients that are not finite; on mps not with every torch (pytorch pull request 186360)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=env.device.type != "mps")
    dtype = autocast_dtype(args.amp, env.device)  # weights stay in float32; bf16 needs no loss scaling, fp16 does
    speed.choose_kernels(model, dtype, env.device)
    step = Step(ddp_model, optimizer, env.device, dtype, args.accum_iter)
    # for img/s and mfu in the log: the encoder's arithmetic on kept patches, the decoder's on all
    macs = sum(flops.pretrain_macs(model, models_mae.kept_patches(model.patch_embed.num_patches, args.mask_ratio)))

    # training
    told = {"n_images": len(dataset), "images": dataset.digest()}
    run = Run(env, args, model, step, forward_macs=macs, milestones=20, **told)
    with datasets.bad_listed(dataset), run:
        for epoch in run.epochs():
            sampler.set_epoch(epoch, run.done.iteration)  # `done`: of an epoch that an earlier process began
            stats = train_one_epoch(
                ddp_model, train_loader, step, schedule, epoch, run, mask_ratio=args.mask_ratio, seed=args.seed
            )
            datasets.report_bad(dataset)  # names of skipped images: workers found them, rank 0 lists them
            run.after_epoch(epoch, stats)  # saved first, looked at afterwards
            run.log.add_to_last(watch.after_epoch(epoch, model, stats["loss"], run.log))
    shutdown()


if __name__ == "__main__":
    exits.run(main, cli.parse(get_args_parser(), __doc__))
