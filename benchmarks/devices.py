"""Adapter training step against full fine-tuning on this machine's device, any Keras backend.

    python benchmarks/devices.py [--backend jax] [--batch 4] [--repeats 20]

Both sides run in one process on the geometry of Dafne's thigh network (250 x 250, 26.6 M
parameters, random weights). It also checks that folding by numpy gives what the device computed.
Where there is no TensorFlow (a GPU machine with JAX or PyTorch only), choose another backend; the
code that adapts is the same.
"""

import argparse
import os
import statistics
import sys
import time


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--backend", default="tensorflow")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--rank", type=int, default=4)
    options.add_argument("--precision", default="float32", help="or mixed_bfloat16, mixed_float16")
    chosen = options.parse_args()
    os.environ["KERAS_BACKEND"] = chosen.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import keras
    import numpy as np

    from dafne_federated.core.adapters import AdaptedNetwork
    from dafne_federated.core.function_sources import thigh_spec
    from dafne_federated.core.model_file import keras_weights
    from dafne_federated.core.network_layers import describe_layers
    from dafne_federated.core.plan import AdaptationPlan, lora_targets
    from dafne_federated.core.state import fold, initial_state

    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy(chosen.precision)
    spec = thigh_spec()
    scope: dict[str, object] = {}
    exec(spec.sources()["init_model_function"], {}, scope)  # our own text
    build = scope["init_model"]
    generator = np.random.default_rng(1)
    images = generator.normal(300, 80, (chosen.batch, 250, 250, 2)).astype("float32")
    images[..., 1] = 1.0
    truth = np.eye(13, dtype="float32")[generator.integers(0, 13, (chosen.batch, 250, 250))]

    def loss(y: object, p: object) -> object:
        p = keras.ops.cast(p, "float32")
        right = keras.ops.sum(y * p[..., :-1], axis=-1)  # type: ignore[index, operator]
        return -keras.ops.mean(keras.ops.log(keras.ops.maximum(right, 1e-30)))

    def measure(network: keras.Model) -> list[float]:
        network.compile(optimizer=keras.optimizers.Adam(1e-4), loss=loss, jit_compile="auto")
        times = []
        for _ in range(chosen.repeats + 2):
            begun = time.perf_counter()
            float(network.train_on_batch(images, truth))  # waits for the device
            times.append(time.perf_counter() - begun)
        return times[2:]

    print("command:", " ".join(sys.argv))
    setting = f"backend {chosen.backend}, {chosen.precision}, batch {chosen.batch}, seed 1"
    print(
        f"keras {keras.__version__}, {setting}, {chosen.repeats} repeats, {device(chosen.backend)}"
    )
    rows: list[tuple[str, int, list[float]]] = []
    full = build()  # type: ignore[operator]
    rows.append(("full fine-tuning", full.count_params(), measure(full)))
    del full
    for where in ("all", "decoder"):
        network = build()  # type: ignore[operator]
        base = keras_weights([np.asarray(w, np.float32) for w in network.get_weights()])
        plan = AdaptationPlan(
            base_digest="0" * 64,
            method="lora",
            rank=chosen.rank,
            max_rank=chosen.rank,
            scale=1.0,
            labels=spec.labels,
            targets=lora_targets(describe_layers(network), where),
        )
        adapted = AdaptedNetwork(network, plan)
        start = initial_state(plan, 1)
        adapted.write(start)
        count = sum(array.size for array in start.values())
        rows.append((f"LoRA rank {chosen.rank}, {where}", count, measure(adapted.trained)))
        state = adapted.read()
        folded = fold(base, plan, state)
        plain = build()  # type: ignore[operator]
        plain.set_weights([folded[key] for key in sorted(folded)])
        apart = np.abs(np.asarray(plain.predict_on_batch(images)) - adapted.predict(images)).max()
        moved = max(float(np.abs(state[key] - start[key]).max()) for key in state)
        print(
            f"{where}: folded against adapted {apart:.2g}, largest change of a factor {moved:.2g}"
        )
    reference = statistics.median(rows[0][2])
    print("| variant | trained values | median step ms | min | max | ratio |")
    print("|---|---|---|---|---|---|")
    for name, count, times in rows:
        median = statistics.median(times)
        cells = (1e3 * median, 1e3 * min(times), 1e3 * max(times))
        print(f"| {name} | {count:,} | " + " | ".join(f"{c:.1f}" for c in cells)
              + f" | {median / reference:.2f} |")  # fmt: skip


def device(backend: str) -> str:
    """Name what the backend computes on."""
    if backend == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if backend == "jax":
        import jax

        return str(jax.devices()[0].device_kind)
    from dafne_federated.core.backend import prepare_backend

    return prepare_backend().name


if __name__ == "__main__":
    main()
