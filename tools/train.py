"""Train a config of mmpretrain, mmdet or mmsegmentation."""

from soft_mm.checkpoints.matching import check_normalized
from soft_mm.config_errors import config_errors
from soft_mm.inference import read_whole_model
from soft_mm.models.attention.softmax_free import normalized_options
from soft_mm.runner import (
    add_hooks,
    build_runner,
    check_resume,
    data_errors,
    find_start,
    full_disk,
    load_config,
    protect_checkpoints,
    runner_parser,
    use_mixed_precision,
)


def main():
    parser = runner_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from the given checkpoint, or without a value from the newest checkpoint in the work dir; '
        'if there is none, start from load_from of the config',
    )
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate to the actual batch size')
    args = parser.parse_args()
    with config_errors(args.config, args.traceback), data_errors():
        cfg = load_config(parser, args)
        find_start(cfg, args.resume)
        content = {}
        if cfg.get('load_from'):
            try:
                # Read safely first, because mmengine would run code in the file.
                cfg.load_from, content = read_whole_model(cfg.load_from)
                if cfg.get('resume'):
                    check_resume(content, cfg.load_from)
            except (FileNotFoundError, ValueError) as error:
                parser.error(str(error))
        if args.amp:
            use_mixed_precision(cfg.optim_wrapper)
        if args.auto_scale_lr:
            if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
                parser.error(f'--auto-scale-lr: set auto_scale_lr = dict(base_batch_size=...) in {args.config} first')
            cfg.auto_scale_lr.enable = True
            add_hooks(cfg, 'soft_mm.ScaledRateHook')
        add_hooks(cfg, 'soft_mm.DataCheckHook', 'soft_mm.BatchNormCheckHook', 'soft_mm.MissingGradientHook')
        protect_checkpoints(cfg)
        with full_disk(cfg.work_dir):
            runner = build_runner(cfg)
            try:
                check_normalized(content, normalized_options(runner.model), cfg.get('load_from'))
            except ValueError as error:
                parser.error(str(error))
            runner.train()


if __name__ == '__main__':
    main()
