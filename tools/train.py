"""Train a config of mmpretrain, mmdet or mmsegmentation."""

from soft_mm.cli import build_runner, runner_parser


def main():
    parser = runner_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from the newest checkpoint of the work dir, or from the one given',
    )
    args = parser.parse_args()
    settings = {}
    if args.resume:
        settings = dict(resume=True, load_from=None if args.resume == 'auto' else args.resume)
    build_runner(args, **settings).train()


if __name__ == '__main__':
    main()
