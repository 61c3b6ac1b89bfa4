"""The three functions inside a `.model` of ours: build, apply and retrain under Dafne's contract.

Dafne stores functions as source text and runs each alone, so each imports what it needs and
assigns its constants at its top; ``function_sources.py`` fills these in. Nothing here is
imported by other code: it is the text that counts.

The contract (Dafne's own models keep it, and its client and server rely on it):
the network takes (rows, columns, 2) float32, image and weight map, and gives the probabilities
of background and labels plus the weight map unchanged; ``apply`` takes one slice with its
resolution in mm and returns a mask by label name; ``incremental_learn`` trains on slices.
"""


def init_model():
    """Build the network: a residual encoder and decoder with skip connections."""
    LABELS_DICT = {1: "label"}
    MODEL_SIZE = [64, 64]
    FILTERS = [16, 32, 64, 128]
    STRIDES = [2, 2, 2]

    import keras
    from keras import layers, ops

    def standardised(image):
        centred = image - ops.mean(image, axis=(1, 2), keepdims=True)
        variance = ops.mean(centred * centred, axis=(1, 2), keepdims=True)
        return centred / ops.sqrt(variance + 1e-3)

    def normalised(level):
        # Momentum 0.9: Dafne trains in few steps, the default of 0.99 would leave the
        # statistics far behind the weights.
        return layers.BatchNormalization(momentum=0.9)(level)

    def refined(level, shortcut, filters):
        level = layers.Conv2D(filters, 3, padding="same")(level)
        level = layers.Activation("relu")(normalised(level))
        level = layers.Conv2D(filters, 3, padding="same")(level)
        level = layers.Add()([normalised(level), shortcut])
        return layers.Activation("relu")(level)

    inputs = keras.Input((MODEL_SIZE[0], MODEL_SIZE[1], 2))
    image = layers.Lambda(lambda both: both[..., 0:1])(inputs)
    weight_map = layers.Lambda(lambda both: both[..., 1:2])(inputs)
    # Each slice to mean 0 and variance 1: scanners differ in scale and offset.
    level = layers.Lambda(standardised)(image)

    skips = []
    for filters, stride in zip(FILTERS[:-1], [1, *STRIDES[:-1]], strict=True):
        level = normalised(layers.Conv2D(filters, stride, strides=stride)(level))
        level = refined(layers.Activation("relu")(level), level, filters)
        skips.append(level)
    level = normalised(layers.Conv2D(FILTERS[-1], STRIDES[-1], strides=STRIDES[-1])(level))
    level = layers.Activation("relu")(level)
    for filters, stride, skip in zip(FILTERS[-2::-1], STRIDES[::-1], skips[::-1], strict=True):
        missing = [skip.shape[axis] - level.shape[axis] * stride for axis in (1, 2)]
        padding = tuple(missing) if max(missing) > 0 else None
        raised = layers.Conv2DTranspose(filters, stride, strides=stride, output_padding=padding)
        level = raised(level)
        shortcut = normalised(level)
        level = layers.Concatenate()([skip, layers.Activation("relu")(shortcut)])
        level = refined(level, shortcut, filters)
    level = layers.Conv2D(max(LABELS_DICT) + 1, 1)(level)
    level = layers.Activation("softmax")(level)
    return keras.Model(inputs, layers.Concatenate()([level, weight_map]))


def apply_model(modelObj, data):
    """Return a mask (rows, columns) int8 by label name for one slice."""
    LABELS_DICT = {1: "label"}
    MODEL_RESOLUTION = [1.0, 1.0]
    MODEL_SIZE = [64, 64]
    BIASCORRECTION_LEVELS = 4
    SIDES = False

    import numpy as np
    from dafne_dl.common import biascorrection
    from dafne_dl.common.padorcut import padorcut
    from scipy.ndimage import zoom

    image = np.asarray(data["image"], np.float32)
    side = data.get("classification", "").strip().lower()
    mirrored = SIDES and side.endswith("left")
    suffix = ""
    if SIDES and data.get("split_laterality", False) and side.endswith(("left", "right")):
        suffix = "_L" if mirrored else "_R"
    names = {value: name + suffix for value, name in LABELS_DICT.items()}
    if not np.isfinite(image).all() or image.max() <= max(image.min(), 0):
        return {name: np.zeros(image.shape, np.int8) for name in names.values()}

    resampled = zoom(image, np.array(data["resolution"])[:2] / np.array(MODEL_RESOLUTION))
    prepared = padorcut(resampled, MODEL_SIZE)
    if prepared.max() <= max(prepared.min(), 0):
        return {name: np.zeros(image.shape, np.int8) for name in names.values()}
    prepared = biascorrection.biascorrection_image(prepared, BIASCORRECTION_LEVELS, -1)
    if mirrored:
        prepared = prepared[:, ::-1]
    stacked = np.stack([prepared, np.zeros(MODEL_SIZE)], axis=-1)[np.newaxis]
    output = np.asarray(modelObj.model.predict(stacked))
    label = np.argmax(output[0, :, :, : max(LABELS_DICT) + 1], axis=-1)
    if mirrored:
        label = label[:, ::-1]
    label = padorcut(label, resampled.shape)
    label = zoom(label, np.array(image.shape) / np.array(label.shape), order=0)
    return {name: (label == value).astype(np.int8) for value, name in names.items()}


def incremental_learn(modelObj, trainingData, trainingOutputs, bs=5, minTrainImages=5):
    """Train on slices with their masks; batch statistics stay as they are."""
    LABELS_DICT = {1: "label"}
    MODEL_RESOLUTION = [1.0, 1.0]
    MODEL_SIZE = [64, 64]
    BIASCORRECTION_LEVELS = 4
    SIDES = False
    LEAST_LABELS = 1  # labels that a slice must have to be trained on
    LEAST_PIXELS = 5  # pixels that a label must have more of, as in Dafne's own functions
    EPOCHS = 5
    LEARNING_RATE = 0.0003

    import keras
    import numpy as np
    from dafne_dl.common import preprocess_train
    from dafne_dl.common.DataGenerators import DataGeneratorMem
    from keras import ops

    # Dafne's own preparation leaves out slices that lack half of the labels it is told of. So
    # slices are prepared in groups that have the same labels, and it is told of these only.
    values = {name: value for value, name in LABELS_DICT.items()}
    groups = {}
    for index, masks in enumerate(trainingOutputs):
        united = {}
        for name, mask in masks.items():
            value = values.get(name, values.get(name[:-2] if name[-2:] in ("_L", "_R") else name))
            if value is not None:
                united[value] = np.logical_or(united.get(value, False), mask).astype(np.uint8)
        drawn = tuple(sorted(value for value, mask in united.items() if mask.sum() > LEAST_PIXELS))
        if len(drawn) >= LEAST_LABELS:
            groups.setdefault(drawn, []).append((index, united))
    side = trainingData.get("classification", "").strip().lower()
    prepared = {}
    for drawn, members in groups.items():
        images, masks = preprocess_train.common_input_process_single(
            {f"label {value}": channel for channel, value in enumerate(drawn, start=1)},
            MODEL_RESOLUTION,
            MODEL_SIZE,
            MODEL_SIZE,
            {
                "image_list": [trainingData["image_list"][index] for index, _ in members],
                "resolution": np.asarray(trainingData["resolution"])[:2],
            },
            [{f"label {value}": united[value] for value in drawn} for _, united in members],
            SIDES and side.endswith("left"),
            BIASCORRECTION_LEVELS,
            -1,
        )
        for (index, _), image, few in zip(members, images, masks, strict=True):
            full = np.zeros((*MODEL_SIZE, max(LABELS_DICT) + 1))
            full[..., list(drawn)] = few[..., 1:]
            prepared[index] = image, full
    images = [image for _, (image, _) in sorted(prepared.items())]
    masks = [mask for _, (_, mask) in sorted(prepared.items())]
    if len(images) < minTrainImages:
        print("Not enough images for training:", len(images))
        return
    slices = preprocess_train.input_creation_mem(images, masks, 49)

    def loss(y_true, y_pred):
        # Weighted cross-entropy plus soft Dice over the labels; finite for every output.
        weight, probability = y_pred[..., -1], y_pred[..., :-1]
        y_true = ops.cast(y_true, probability.dtype)
        right = ops.sum(y_true * probability, axis=-1)
        entropy = -ops.sum(weight * ops.log(ops.maximum(right, 1e-30)))
        entropy = entropy / ops.maximum(ops.sum(weight), 1e-30)
        overlap = ops.sum((y_true * probability)[..., 1:], axis=(0, 1, 2))
        size = ops.sum((y_true + probability)[..., 1:], axis=(0, 1, 2))
        return entropy + 1.0 - ops.mean((2.0 * overlap + 1.0) / (size + 1.0))

    network = modelObj.model
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    steps = len(slices) // bs
    generator = DataGeneratorMem(
        slices, list_X=list(range(steps * bs)), batch_size=bs, dim=MODEL_SIZE
    )
    network.compile(loss=loss, optimizer=keras.optimizers.Adam(LEARNING_RATE))
    network.fit(generator, steps_per_epoch=steps, epochs=EPOCHS, verbose=1)
