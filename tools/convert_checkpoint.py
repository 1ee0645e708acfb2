"""Convert a checkpoint of the authors' classification code to soft_mm's names.

Architecture, number of classes and grids of the position embeddings are read from the file. A file of the authors' code
as published may hold a "small" of 38.9M parameters, which becomes an architecture of its own. Averaged weights are
taken where there are any.
"""

import argparse
import os
from pathlib import Path

import torch

from soft_mm.checkpoints import convert_checkpoint, import_safetensors, read_checkpoint
from soft_mm.version import __version__

BATCHES = dict(tiny='8xb128', small='8xb128', medium='8xb32', large='8xb32', huge='8xb32')


def write(conversion, path, normalized, source):
    """Write to a file beside and rename, so that no half of one is left."""
    part = path.with_name(f'.{path.name}.part')
    meta = dict(arch=conversion.arch, normalized=normalized, num_classes=conversion.num_classes, source=source)
    meta |= dict(weights=conversion.weights, soft_mm_version=__version__)
    try:
        if path.suffix == '.safetensors':
            tensors = {key: value.contiguous().clone() for key, value in conversion.state_dict.items()}
            metadata = {key: str(value) for key, value in meta.items()}
            import_safetensors(path).torch.save_file(tensors, part, metadata)
        else:
            torch.save(dict(meta=meta, state_dict=conversion.state_dict), part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def config_text(conversion, normalized):
    """The config that loads the checkpoint, or the lines that make one."""
    norm = '-norm' if normalized else ''
    if isinstance(conversion.arch, str):
        return f'configs/imagenet/soft-{conversion.arch}{norm}_{BATCHES[conversion.arch]}_in1k.py'
    arch = ', '.join(f'{key}={value}' for key, value in conversion.arch.items())
    return (
        f"_base_ = 'configs/imagenet/soft-small{norm}_8xb128_in1k.py'\n"
        f'model = dict(backbone=dict(arch=dict(_delete_=True, {arch})))'
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', type=Path, help="the authors' file (.pth, .pth.tar, .safetensors)")
    parser.add_argument('dst', type=Path, help='file to write (.pth or .safetensors)')
    parser.add_argument('--normalized', action='store_true', help='the model is normalised, where the file is silent')
    parser.add_argument('--weights', choices=('ema', 'raw'), help='averaged weights, or those of the last step')
    parser.add_argument('--backbone-only', action='store_true', help='leave the classifier out')
    args = parser.parse_args()
    if args.dst.suffix not in ('.pth', '.safetensors'):
        parser.error(f'{args.dst}: the file to write must end in .pth or .safetensors')
    try:
        if args.dst.suffix == '.safetensors':
            import_safetensors(args.dst)
        conversion = convert_checkpoint(read_checkpoint(args.src), args.weights, args.backbone_only)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if args.normalized and conversion.normalized is False:
        parser.error(f'--normalized: {args.src} says that its model is plain')
    normalized = args.normalized or bool(conversion.normalized)
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    write(conversion, args.dst, normalized, args.src.name)
    parameters = sum(value.numel() for value in conversion.state_dict.values() if value.is_floating_point())
    told = 'the file says' if conversion.normalized is not None else 'as asked' if normalized else 'the file is silent'
    print(f'weights:      {conversion.weights}')
    print(f'architecture: {conversion.arch}, {parameters / 1e6:.2f} M numbers')
    print(f'attention:    {"normalised" if normalized else "plain"} ({told})')
    print(f'classes:      {conversion.num_classes}')
    print(f'positions:    {", ".join("x".join(map(str, grid)) for grid in conversion.grids)}')
    print(f'keys:         {len(conversion.state_dict)} written, dropped {list(conversion.dropped) or "none"}')
    print(f'written:      {args.dst}')
    print(f'config:\n{config_text(conversion, normalized)}')


if __name__ == '__main__':
    main()
