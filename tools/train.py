"""Train a config of mmpretrain, mmdet or mmsegmentation."""

import os

import torch

from soft_mm.cli import build_runner, load_config, missing_files, runner_parser


def main():
    parser = runner_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from the newest checkpoint of the work dir, or from the one given',
    )
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help="scale the learning rate from the config's batch to the batch here"
    )
    args = parser.parse_args()
    with missing_files():
        cfg = load_config(parser, args)
        if args.resume:
            if args.resume != 'auto' and '://' not in args.resume and not os.path.isfile(args.resume):
                parser.error(f'--resume: there is no checkpoint {args.resume}')
            cfg.resume, cfg.load_from = True, None if args.resume == 'auto' else args.resume
        if args.amp:
            if not torch.cuda.is_available():
                parser.error('--amp: mixed precision needs a GPU, and PyTorch sees none')
            cfg.optim_wrapper.type = 'AmpOptimWrapper'
            cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
        if args.auto_scale_lr:
            if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
                parser.error(f'--auto-scale-lr: {args.config} does not set auto_scale_lr = dict(base_batch_size=...)')
            cfg.auto_scale_lr.enable = True
        build_runner(cfg).train()


if __name__ == '__main__':
    main()
