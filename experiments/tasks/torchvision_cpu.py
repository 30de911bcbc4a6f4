"""Import torchvision beside any torch. Import this before any other use of torchvision.

torchvision's Linux wheels are CUDA builds: beside a CPU torch their operators do not load, and the import fails where it registers
shape functions for `nms`. Declaring the two schemas lets it pass; models, transforms and datasets then work, `ops.nms` itself and
`io.decode_jpeg` do not.
"""

import torch

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    library = torch.library.Library("torchvision", "DEF")  # kept alive by this module
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
