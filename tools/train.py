"""Train a config of mmpretrain, mmdet or mmsegmentation."""

import torch

from soft_mm.inference import read_whole_model
from soft_mm.runner import build_runner, load_config, missing_files, runner_parser


def main():
    parser = runner_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from the newest checkpoint of the work dir, or from the given checkpoint',
    )
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate to the batch size used here'
    )
    args = parser.parse_args()
    with missing_files():
        cfg = load_config(parser, args)
        if args.resume:
            cfg.resume, cfg.load_from = True, None if args.resume == 'auto' else args.resume
        if cfg.get('load_from'):
            try:
                # mmengine would run code that the file holds.
                cfg.load_from, _ = read_whole_model(cfg.load_from)
            except (FileNotFoundError, ValueError) as error:
                parser.error(str(error))
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
