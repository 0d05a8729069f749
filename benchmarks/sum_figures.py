"""The words of the figures about sums: exact ones, private ones, and what updates cost."""

import statistics
from typing import Any

from benchmarks.words import percent, seeds_of, standard_error, table_of


def merge_costs(found: Any) -> str:
    tables = (f"{each['parameters']:,} parameters:\n\n{_costs(each['rows'])}" for each in found["tables"])
    return (
        f"A version is made of {found['devices']} updates, as many as a sum of 4 bits holds. One helper opens a "
        "sum. Bytes up are those of all frames of an update, and a device's CPU is what it takes to make them (one "
        "thread, median). Bytes of a version are those updates, what aggregator and helper ask and answer, and what is "
        "published, once. CPU of aggregator and helper is that of their processes for a version. Versions a second are "
        "made one after the other: the next updates are sent when the last version has come. Broker, aggregator, "
        f"helper and devices share the machine; {found['versions']} versions of each kind. Encryption (`bfv`) is for "
        "small models only.\n\n" + "\n\n".join(tables)
    )


def _costs(rows: Any) -> str:
    head = (
        "update", "bytes up", "of float32", "device's CPU", "bytes of a version", "aggregator's CPU", "helper's CPU",
        "versions/s", "devices in a sum, at most",
    )  # fmt: skip
    float32 = next(row["bytes"] for row in rows if row["update"] == "plain float32")
    body = [
        [
            row["update"],
            f"{row['bytes']:,}",
            percent(row["bytes"] / float32),
            f"{row['device_ms']:.1f} ms",
            f"{row['merge_bytes']:,}",
            f"{row['aggregator_ms']:.0f} ms",
            "-" if row["helper_ms"] is None else f"{row['helper_ms']:.0f} ms",
            f"{row['versions_per_s']:.1f}",
            str(row["devices_max"] or "-"),
        ]
        for row in rows
    ]
    return table_of(head, body)


def exact_sums(found: Any) -> str:
    rounded, way, took = found["rounding"], found["accuracy"], found["revocation"]
    exact, noise = rounded["exact"], rounded["terngrad"]
    apart = [100 * (new - old) for new, old in zip(way["exact"], way["in order"], strict=True)]
    percent = {name: f"{100 * statistics.mean(values):.2f} %" for name, values in way.items()}
    head = ("sum", "adders", "CPU an update, all adders", "the busiest adder", "updates/s by its CPU", "times")
    rows = found["adders"]
    body = [
        [
            row["way"],
            str(row["adders"]),
            f"{row['cpu_ms']:.2f} ms",
            f"{row.get('busiest_ms', row['cpu_ms']):.2f} ms",
            f"{row['per_s']:,.0f}",
            f"{row['per_s'] / rows[0]['per_s']:.1f}",
        ]
        for row in rows
    ]
    how = " with the compiled loop" if found["compiled"] else ""
    old, new = took["cpu_ms"]["in order"], took["cpu_ms"]["exact"]
    return (
        f"Buffers of {found['updates']} updates, made ternary at random ({found['buffers']} buffers). Rounding their "
        f"coefficients moves a sum by {exact['error']:.1e} of its norm, where TernGrad itself has moved it by "
        f"{noise['error']:.2f}: {noise['error'] / exact['error']:,.0f} times as much. Its bias, the part along the "
        f"sum, is {exact['bias']:+.1e} (standard error {exact['bias_se']:.1e}); TernGrad's, which clips, is "
        f"{noise['bias']:+.1e}. digits-numpy, 8 devices, Dirichlet 0.5, {found['versions']} versions, "
        f"{seeds_of(len(apart))}: {percent['exact']} with exact sums, {percent['in order']} in order, "
        f"{statistics.mean(apart):+.2f} points apart (standard error {standard_error(apart):.2f}).\n\n"
        f"Threads that add updates of {found['parameters']:,} parameters{how}, by the CPU time of the threads. All "
        f"have the same bits.\n\n{table_of(head, body)}\n\n"
        f"To take one of {took['devices']} devices out of a buffer of {took['buffer']} takes {old:.0f} ms of CPU where "
        f"the others are added anew, and {new:.1f} ms where its updates are subtracted: {old / new:.0f} times less."
    )


def private_sums(found: Any) -> str:
    own, helper, bare, took = (found[name] for name in ("device", "helper", "bare", "ingest"))
    return (
        f"An update of {found['parameters']:,} parameters with {found['bits']} bits a value, and one helper. In CPU "
        "time of one thread (medians): a device draws its integers in "
        f"{own['draw_ms']:.1f} ms, masks them in {own['mask_ms']:.1f} ms (ChaCha20's stream alone takes "
        f"{own['stream_ms']:.1f} ms) and seals them in {own['seal_ms']:.1f} ms. The whole update takes "
        f"{own['whole_ms']:.0f} ms, a plain one {own['plain_ms']:.0f} ms. A helper prepares a sum of {found['sum']} in "
        f"{helper['prepare_ms']:.1f} ms and opens it in {helper['open_ms']:.0f} ms; to make and add the masks, and "
        f"nothing else, takes {helper['masks_ms']:.0f} ms. An aggregator answers {took['updates_per_s']:.0f} private "
        f"updates a second, while broker, helper and senders share its cores; {took['counts']['merged']} of "
        f"{took['counts']['accepted']} were merged. Until it is merged, each takes {took['aggregator_cpu_ms']:.0f} ms "
        f"of CPU, and {took['helper_cpu_ms']:.1f} ms of the helper's. To verify, hash, unseal and append one, and "
        f"nothing else, takes {sum(bare.values()):.1f} ms."
    )


def encrypted_sums(found: Any) -> str:
    head = (
        "parameters", "kind", "an update", "to the helper", "from it", "device", "aggregator", "helper",
    )  # fmt: skip
    body = [
        [
            f"{row['parameters']:,}",
            f"`{row['kind']}`",
            *(f"{row[name]:,}" for name in ("update_bytes", "ask_bytes", "answer_bytes")),
            *(f"{row[name]:,.1f} ms" for name in ("device_ms", "aggregator_ms", "helper_ms")),
        ]
        for row in found["rows"]
    ]
    key = max(row["key_bytes"] for row in found["rows"])
    return (
        f"A sum of {found['sum']} updates with {found['bits']} bits a value, by masks and by encryption (`bfv`): bytes "
        "of the bodies, and CPU time of one thread (medians). An aggregator's time is for all updates of the sum, a "
        "device's for its own. A set's headers go to the helper with both kinds. With `bfv` the helper's public key, "
        f"{key:,} bytes, goes to each device with each version besides. Both open to the same integers. A federation "
        f"of the kind `bfv` takes models of up to {found['limit']:,} parameters.\n\n{table_of(head, body)}"
    )
