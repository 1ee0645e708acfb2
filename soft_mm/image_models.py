"""Trained models as functions from images to probabilities, a class map, or boxes and masks, for an export.

They include the normalisation of the data preprocessor and the post-processing of the head. Detectors use the toolbox's
priors and box decoding. Non-maximum suppression is torchvision's, which ONNX has as an operator. The outputs have a
fixed number of rows, so the outputs of all images in a batch have one shape.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTPUTS = dict(
    classification=('probabilities',),
    segmentation=('class_map',),
    detection=('boxes', 'scores', 'labels'),
    instances=('boxes', 'scores', 'labels', 'masks'),
)


class ImageModel(nn.Module):
    """A trained model as a function of images. Subclasses add the head of one task.

    Args:
        model (nn.Module): Model of a toolbox in evaluation mode, with a data preprocessor.
    """

    task: str
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        preprocessor = model.data_preprocessor
        # The toolboxes read images as BGR, so a model without conversion was trained with BGR.
        self.flip = not getattr(preprocessor, 'to_rgb', getattr(preprocessor, '_channel_conversion', False))
        normalize = preprocessor._enable_normalize
        self.register_buffer('mean', preprocessor.mean.view(1, 3, 1, 1) if normalize else torch.zeros(1, 3, 1, 1))
        self.register_buffer('std', preprocessor.std.view(1, 3, 1, 1) if normalize else torch.ones(1, 3, 1, 1))
        if self.task == 'segmentation':
            # mmsegmentation pads to `size_divisor` only in training.
            self.divisor = (preprocessor.test_cfg or {}).get('size_divisor') or 1
            self.pad_value = preprocessor.pad_val
        else:
            self.divisor, self.pad_value = preprocessor.pad_size_divisor, preprocessor.pad_value

    def preprocess(self, image: Tensor) -> Tensor:
        """Normalise and pad images.

        Args:
            image (Tensor): RGB, 0 to 255, ``(N, 3, H, W)``.

        Returns:
            Tensor: ``(N, 3, H', W')``, padded on the right and at the bottom to multiples of the divisor.
        """
        image = image.float()
        image = ((image.flip(1) if self.flip else image) - self.mean) / self.std
        if self.divisor == 1:
            return image
        bottom, right = (-side % self.divisor for side in image.shape[-2:])
        return F.pad(image, (0, right, 0, bottom), value=self.pad_value)


class Classification(ImageModel):
    """Images ``(N, 3, H, W)`` to class probabilities ``(N, classes)``."""

    task = 'classification'

    def forward(self, image: Tensor) -> Tensor:
        """Compute the probabilities."""
        return self.model(self.preprocess(image), mode='tensor').softmax(1)


class Segmentation(ImageModel):
    """Images ``(N, 3, H, W)`` to class indices ``(N, H, W)``, int64."""

    task = 'segmentation'

    def __init__(self, model: Any) -> None:
        # mmsegmentation's upsampling computes its size with int(), which an export makes constant.
        model = copy.deepcopy(model)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child).__name__ == 'Upsample' and child.size is None:
                    setattr(parent, name, IntegerUpsample(child.scale_factor, child.mode, child.align_corners))
        super().__init__(model)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the class of every pixel."""
        height, width = image.shape[-2:]
        x = self.preprocess(image)
        size = (x.shape[-2], x.shape[-1])
        metas = [dict(img_shape=size, pad_shape=size, ori_shape=size)]
        return self.model.encode_decode(x, metas)[..., :height, :width].argmax(1)


class IntegerUpsample(nn.Module):
    """Interpolation of maps by an integer factor.

    Args:
        scale_factor (float): Factor, whose value is an integer.
        mode (str): Mode of ``torch.nn.functional.interpolate``.
        align_corners (bool | None): Option of ``torch.nn.functional.interpolate``.

    Raises:
        ValueError: If the factor is no integer.
    """

    def __init__(self, scale_factor: float, mode: str, align_corners: bool | None) -> None:
        super().__init__()
        if isinstance(scale_factor, (tuple, list)) or scale_factor != int(scale_factor):
            raise ValueError(f'a head with scale_factor={scale_factor} cannot be exported: expected an integer')
        self.scale_factor, self.mode, self.align_corners = int(scale_factor), mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        """Interpolate ``(N, C, H, W)`` to ``(N, C, s * H, s * W)``."""
        size = [side * self.scale_factor for side in x.shape[-2:]]
        return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


class Detection(ImageModel):
    """Images to ``K`` boxes per image, best first, with ``K`` the ``max_per_img`` of the config.

    Boxes ``(N, K, 4)`` are left, top, right, bottom in pixels of the image; scores ``(N, K)`` are from 0 to 1; labels
    ``(N, K)`` are int64. Rows after the last box have score 0 and label -1.
    """

    task = 'detection'

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute boxes, scores and labels."""
        features = self.model.extract_feat(self.preprocess(image))
        head = self.model.bbox_head
        boxes, scores, labels, _ = dense_boxes(head, head.test_cfg, features, image.shape[-2:])
        valid = (scores > head.test_cfg.score_thr) & is_large(boxes, head.test_cfg)
        return best_boxes(boxes, scores, labels, valid, head.test_cfg, image.shape[-2:])


class Instances(ImageModel):
    """As :class:`Detection`, for detectors with proposals. Detectors with a mask head add masks ``(N, K, h, w)``.

    A mask holds the probability of the object on a grid over its box.
    """

    def __init__(self, model: Any) -> None:
        self.task = 'instances' if model.roi_head.with_mask else 'detection'
        super().__init__(model)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute boxes, scores, labels and masks."""
        size, batch = image.shape[-2:], image.shape[0]
        features = self.model.extract_feat(self.preprocess(image))
        rpn, head = self.model.rpn_head, self.model.roi_head
        boxes, scores, _, levels = dense_boxes(rpn, rpn.test_cfg, features, size)
        proposals, proposal_scores, _ = best_boxes(
            boxes, scores, levels, is_large(boxes, rpn.test_cfg), rpn.test_cfg, size
        )
        count = proposals.shape[1]
        x = pool_regions(head.bbox_roi_extractor, features, proposals)
        logits, deltas = head.bbox_head(x)
        classes = head.bbox_head.num_classes
        scores = logits.softmax(-1)[:, :-1].reshape(batch, count * classes)
        repeats = 1 if head.bbox_head.reg_class_agnostic else classes
        corners = proposals.flatten(0, 1).repeat_interleave(repeats, 0)
        boxes = decode(head.bbox_head.bbox_coder, corners, deltas.reshape(-1, 4), size)
        boxes = boxes.view(-1, repeats, 4).expand(-1, classes, 4).reshape(batch, count * classes, 4)
        labels = torch.arange(classes, device=image.device).repeat(count).expand(batch, -1)
        valid = (scores > head.test_cfg.score_thr) & (proposal_scores > 0).repeat_interleave(classes, 1)
        boxes, scores, labels = best_boxes(boxes, scores, labels, valid, head.test_cfg, size)
        if not head.with_mask:
            return boxes, scores, labels
        masks = head.mask_head(pool_regions(head.mask_roi_extractor, features, boxes))
        if not head.mask_head.class_agnostic:
            index = labels.flatten().clamp(min=0).view(-1, 1, 1, 1).expand(-1, 1, *masks.shape[-2:])
            masks = masks.gather(1, index)
        return boxes, scores, labels, masks.sigmoid().unflatten(0, (batch, -1)).squeeze(2)


def decode(coder: Any, priors: Tensor, deltas: Tensor, size: Sequence[int]) -> Tensor:
    """Decode boxes with mmdet's function, without the special form that its coder takes in an export.

    Args:
        coder (DeltaXYWHBBoxCoder): Box coder of a head.
        priors (Tensor): ``(n, 4)``.
        deltas (Tensor): ``(n, 4)``.
        size (Sequence[int]): ``(H, W)`` to which the boxes are clipped.

    Returns:
        Tensor: ``(n, 4)``.
    """
    from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import delta2bbox

    boxes = delta2bbox(
        priors, deltas, coder.means, coder.stds, add_ctr_clamp=coder.add_ctr_clamp, ctr_clamp=coder.ctr_clamp
    )
    height, width = size
    return torch.stack([boxes[:, i].clamp(0, width if i % 2 == 0 else height) for i in range(4)], 1)


def dense_boxes(
    head: Any, cfg: Any, features: Sequence[Tensor], size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the candidate boxes of a dense head: the ``nms_pre`` best pairs of prior and class of each level.

    Args:
        head (AnchorHead): Dense head, such as ``RetinaHead`` or ``RPNHead``.
        cfg (ConfigDict): Its ``test_cfg``.
        features (Sequence[Tensor]): Feature maps ``(N, C, H', W')``.
        size (Sequence[int]): ``(H, W)`` of the image.

    Returns:
        tuple[Tensor, Tensor, Tensor, Tensor]: Boxes ``(N, n, 4)``, and scores, labels and levels ``(N, n)``.
    """
    logits, deltas = head(features)
    priors = head.prior_generator.grid_priors([level.shape[-2:] for level in logits], device=logits[0].device)
    channels, found = head.cls_out_channels, []
    for level, (logit, delta, prior) in enumerate(zip(logits, deltas, priors)):
        batch = logit.shape[0]
        scores = logit.permute(0, 2, 3, 1).reshape(batch, -1, channels)
        scores = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(-1)[..., :-1]
        classes = scores.shape[-1]
        scores, index = scores.flatten(1).topk(torch.sym_min(cfg.nms_pre, scores.shape[1] * classes))
        rows = (index // classes)[..., None].expand(-1, -1, 4)
        delta = delta.permute(0, 2, 3, 1).reshape(batch, -1, 4).gather(1, rows)
        chosen = prior.expand(batch, -1, -1).gather(1, rows)
        boxes = decode(head.bbox_coder, chosen.flatten(0, 1), delta.flatten(0, 1), size)
        found.append((boxes.view(batch, -1, 4), scores, index % classes, torch.full_like(index, level)))
    boxes, scores, labels, levels = (torch.cat(parts, 1) for parts in zip(*found))
    return boxes, scores, labels, levels


def is_large(boxes: Tensor, cfg: Any) -> Tensor:
    """Return which boxes are larger than the ``min_bbox_size`` of a head.

    Args:
        boxes (Tensor): ``(N, n, 4)``.
        cfg (ConfigDict): ``test_cfg`` of the head.

    Returns:
        Tensor: ``(N, n)``, bool.
    """
    smallest = cfg.get('min_bbox_size', -1)
    if smallest < 0:
        return torch.ones_like(boxes[..., 0], dtype=torch.bool)
    return ((boxes[..., 2:] - boxes[..., :2]) > smallest).all(-1)


def best_boxes(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, cfg: Any, size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress overlapping boxes of the same image and group, and keep the ``max_per_img`` best of each image.

    Args:
        boxes (Tensor): ``(N, n, 4)``.
        scores (Tensor): ``(N, n)``.
        groups (Tensor): Classes or levels ``(N, n)``. Boxes of different groups do not suppress each other.
        valid (Tensor): ``(N, n)``, False for boxes to leave out.
        cfg (ConfigDict): ``test_cfg`` with ``nms`` and ``max_per_img``.
        size (Sequence[int]): ``(H, W)``, the largest coordinates.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Boxes ``(N, K, 4)``, and scores and groups ``(N, K)``, with score 0 and group -1
        after the last box.
    """
    from torchvision.ops import nms

    batch, count = scores.shape
    height, width = size
    # Groups are moved apart to the right and images downwards, so that one suppression serves all.
    image = torch.arange(batch, device=boxes.device)[:, None].expand_as(groups)
    shift = torch.stack([groups * (width + 1), image * (height + 1)], -1).repeat(1, 1, 2)
    apart = (boxes + shift.to(boxes.dtype)).flatten(0, 1)
    index = valid.flatten().nonzero().squeeze(1)
    kept = index[nms(apart[index], scores.flatten()[index], cfg.nms.iou_threshold)]
    survives = torch.zeros_like(valid.flatten(), dtype=scores.dtype).scatter(
        0, kept, torch.ones_like(kept, dtype=scores.dtype)
    )
    ranked = torch.where(survives.view(batch, count) > 0, scores, torch.zeros_like(scores))
    scores, best = ranked.topk(torch.sym_min(cfg.max_per_img, count))
    boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4))
    present = scores > 0
    return boxes * present[..., None], scores, torch.where(present, groups.gather(1, best), -1)


def pool_regions(extractor: Any, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Pool the features of regions as mmdet's ``SingleRoIExtractor`` does, with torchvision's operator.

    Args:
        extractor (SingleRoIExtractor): Extractor of a head.
        features (Sequence[Tensor]): Feature maps.
        boxes (Tensor): ``(N, K, 4)``.

    Returns:
        Tensor: ``(N * K, C, h, w)``.
    """
    from torchvision.ops import roi_align

    batch, count = boxes.shape[:2]
    image = torch.arange(batch, device=boxes.device).repeat_interleave(count)
    regions = torch.cat([image[:, None].to(boxes.dtype), boxes.flatten(0, 1)], 1)
    level = extractor.map_roi_levels(regions, extractor.num_inputs)[:, None, None, None]
    pooled = None
    for index, (layer, x) in enumerate(zip(extractor.roi_layers, features)):
        here = roi_align(
            x, regions, layer.output_size, layer.spatial_scale, max(layer.sampling_ratio, 0), layer.aligned
        )
        pooled = here if pooled is None else torch.where(level == index, here, pooled)
    assert pooled is not None
    return pooled


def image_model(model: Any) -> ImageModel:
    """Wrap a trained model as a function of images.

    Args:
        model (nn.Module): Model of mmpretrain, mmdet or mmsegmentation in evaluation mode.

    Returns:
        ImageModel: The function.

    Raises:
        ValueError: If the model cannot be exported. The message says why.
    """
    kind = type(model).__name__
    if kind not in _CHECKS:
        raise ValueError(f'a {kind} cannot be exported: supported are {", ".join(_CHECKS)}')
    wrapper, check = _CHECKS[kind]
    if reasons := [reason for reason, holds in check(model) if holds]:
        raise ValueError(f'this {kind} cannot be exported, because {"; ".join(reasons)}')
    return wrapper(model)


def _check_classifier(model: Any) -> Iterator[tuple[str, bool]]:
    head = type(model.head).__name__
    yield f'its head is a {head} and not a LinearClsHead', head != 'LinearClsHead'
    yield from _check_pixels(model)


def _check_segmentor(model: Any) -> Iterator[tuple[str, bool]]:
    mode = model.test_cfg.get('mode')
    yield f"its test_cfg.mode is {mode!r} and not 'whole'", mode != 'whole'
    head = type(model.decode_head).__name__
    yield f'a {head} computes masks from queries', head in ('MaskFormerHead', 'Mask2FormerHead')
    yield 'it has a single output channel', model.out_channels == 1
    yield 'its data_preprocessor pads to one size', bool((model.data_preprocessor.test_cfg or {}).get('size'))
    yield from _check_pixels(model)


def _check_pixels(model: Any) -> Iterator[tuple[str, bool]]:
    preprocessor = model.data_preprocessor
    yield (
        'its data_preprocessor normalises one channel',
        preprocessor._enable_normalize and preprocessor.mean.numel() == 1,
    )


def _check_dense_detector(model: Any) -> Iterator[tuple[str, bool]]:
    head = type(model.bbox_head).__name__
    yield f'its head is a {head} and not a RetinaHead', head != 'RetinaHead'
    if head == 'RetinaHead':
        yield from _check_boxes(model.bbox_head, model.bbox_head.test_cfg)
        # mmdet compares after it has scaled the boxes to the original image.
        smallest = model.bbox_head.test_cfg.get('min_bbox_size', -1)
        yield f'its min_bbox_size is {smallest}, which depends on the original image', smallest > 0
    yield from _check_pixels(model)


def _check_two_stages(model: Any) -> Iterator[tuple[str, bool]]:
    roi = model.roi_head
    yield f'its RoI head is a {type(roi).__name__}', type(roi).__name__ != 'StandardRoIHead'
    yield 'its RoI head has a shared head', roi.with_shared_head
    yield from _check_boxes(model.rpn_head, model.rpn_head.test_cfg)
    yield from _check_boxes(roi.bbox_head, roi.test_cfg)
    yield 'its box head predicts no boxes', not roi.bbox_head.with_reg
    extractors = [roi.bbox_roi_extractor, *([roi.mask_roi_extractor] if roi.with_mask else [])]
    for extractor in extractors:
        name = type(extractor).__name__
        yield f'its RoI extractor is a {name}', name != 'SingleRoIExtractor'
        layers = [type(layer).__name__ for layer in getattr(extractor, 'roi_layers', [])]
        yield f'its RoI extractor has the layers {layers}', set(layers) != {'RoIAlign'}
        modes = {getattr(layer, 'pool_mode', 'avg') for layer in getattr(extractor, 'roi_layers', [])}
        yield f'its RoI extractor pools by {sorted(modes)}', modes != {'avg'}
    if roi.with_mask:
        name = type(roi.mask_head).__name__
        yield f'its mask head is a {name}', name != 'FCNMaskHead'
    yield from _check_pixels(model)


def _check_boxes(head: Any, cfg: Any) -> Iterator[tuple[str, bool]]:
    """Yield the reasons why :func:`decode` and :func:`best_boxes` would give other boxes than a head."""
    name, coder = type(head).__name__, head.bbox_coder
    yield f'the boxes of {name} are coded by {type(coder).__name__}', type(coder).__name__ != 'DeltaXYWHBBoxCoder'
    yield f'{name} has a loss with scores of its own', bool(getattr(head.loss_cls, 'custom_cls_channels', False))
    yield f'the boxes of {name} are not clipped to the image', not getattr(coder, 'clip_border', True)
    nms = cfg.get('nms') or {}
    plain = nms.get('type', 'nms') == 'nms' and not nms.get('class_agnostic', False) and 'iou_threshold' in nms
    yield f'{name} suppresses overlapping boxes by {dict(nms)}', not plain
    for key in ('max_per_img', 'nms_pre'):
        # A box head takes all proposals.
        value = cfg.get(key, 1 if key == 'nms_pre' and hasattr(head, 'fc_cls') else 0)
        yield f'{name} has {key}={value} in its test_cfg', value < 1


_CHECKS: dict[str, tuple[type[ImageModel], Callable[[Any], Iterator[tuple[str, bool]]]]] = dict(
    ImageClassifier=(Classification, _check_classifier),
    EncoderDecoder=(Segmentation, _check_segmentor),
    RetinaNet=(Detection, _check_dense_detector),
    FasterRCNN=(Instances, _check_two_stages),
    MaskRCNN=(Instances, _check_two_stages),
)
