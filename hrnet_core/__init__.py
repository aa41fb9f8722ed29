"""hrnet_core: the method. Knows no cluster, no tracker, no HTTP. Imports nothing here on purpose.

Letters in shapes
    N images or crops, P people, K keypoints, H x W rows x columns of a heatmap, h x w of a crop.
    Sizes are (width, height), arrays (height, width); models are named height first (256x192).

Spaces
    image    px of the photograph          crop    px of the network's input
    heatmap  cells of the network's output (crop / 4, or as the codec says)
    In all three, (0, 0) is the centre of the top-left pixel. A matrix names both its spaces:
    image_to_crop is (2, 3) and maps (x, y, 1) in image px to crop px.

Arrays
    image      uint8 (H, W, 3), RGB        crops     uint8 (P, h, w, 3), RGB
    keypoints  float32 (..., K, 2), x y    visible   (..., K): 0 not labelled, 1 hidden, 2 seen
    weights    (..., K), 0 or 1 unless joint weights are on
    scores     (..., K)                    heatmaps  float32 (N, K, H, W)
    bbox_xywh, boxes_xyxy: the format is in the name.
    center (x, y), scale (w, h): image px, scale after padding; never in units of 200 px.
    sigma is the Gaussian's, in heatmap cells; oks_sigmas are COCO's per-keypoint constants.

No function changes its input.
"""
