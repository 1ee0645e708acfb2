"""Convert a checkpoint of the authors' classification code to soft_mm's names.

The architecture, the number of classes and the grids of the position embeddings are read from the file. The "small"
model of the authors' code has 38.9M parameters instead of the paper's 24M, so its architecture is printed as a dict.
Averaged weights are used if the file has them.
"""

import argparse
from pathlib import Path

from soft_mm.checkpoints.convert import config_of, convert_checkpoint, save_conversion
from soft_mm.checkpoints.reading import import_safetensors, read_checkpoint


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', type=Path, help="the authors' file (.pth, .pth.tar, .safetensors)")
    parser.add_argument('dst', type=Path, help='file to write (.pth or .safetensors)')
    parser.add_argument(
        '--normalized', action='store_true', help='the attention is normalised (needed if the file does not say so)'
    )
    parser.add_argument(
        '--weights',
        choices=('ema', 'raw'),
        help='averaged weights, or weights of the last step (default: averaged if present)',
    )
    parser.add_argument('--backbone-only', action='store_true', help='leave out the classifier')
    args = parser.parse_args()
    if args.dst.suffix not in ('.pth', '.safetensors'):
        parser.error(f'{args.dst}: expected a file name that ends in .pth or .safetensors')
    if args.dst.resolve() == args.src.resolve():
        parser.error(f'{args.dst} is the file to convert: give another file as DST')
    try:
        if args.dst.suffix == '.safetensors':
            import_safetensors(args.dst)
        conversion = convert_checkpoint(read_checkpoint(args.src), args.weights, args.backbone_only)
        if args.normalized and conversion.normalized is False:
            parser.error(f'--normalized: the attention is not normalised according to {args.src}; leave the option out')
        normalized = args.normalized or bool(conversion.normalized)
        args.dst.parent.mkdir(parents=True, exist_ok=True)
        save_conversion(conversion, args.dst, normalized, args.src.name)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    parameters = sum(value.numel() for value in conversion.state_dict.values() if value.is_floating_point())
    origin = 'from the file' if conversion.normalized is not None else 'as requested' if normalized else 'default'
    written, dropped = len(conversion.state_dict), list(conversion.dropped)
    print(f'weights:      {conversion.weights}; unused: {", ".join(conversion.unused) or "nothing"}')
    print(f'architecture: {conversion.arch}, {parameters / 1e6:.2f} M parameters and statistics')
    print(f'attention:    {"normalised" if normalized else "plain"} ({origin})')
    print(f'classes:      {conversion.num_classes}')
    print(f'positions:    {", ".join("x".join(map(str, grid)) for grid in conversion.grids)}')
    print(
        f'keys:         {conversion.num_source} read, {len(dropped)} dropped {dropped}, {written} written '
        '(query and value projections are stacked; the position embedding of the class token is a separate key)'
    )
    print(f'written:      {args.dst}')
    print(f'config:\n{config_of(conversion, args.dst, normalized)}')


if __name__ == '__main__':
    main()
