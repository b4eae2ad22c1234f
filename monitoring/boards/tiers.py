"""Where residuals are kept for later segments, and how they move."""

from monitoring.boards.panel import Dashboard, Panel, Row, Target
from monitoring.boards.query import of, rate, ratio, total

_ENDED = rate("prefetches_total")

_HELD = Row(
    "What the tiers hold",
    (
        Panel(
            "Bytes against budget",
            "The host tier fills up by design; the disk tier loses entries when it is full.",
            "bytes",
            (
                Target(total(of("tier_bytes"), "tier"), "{{tier}}"),
                Target(total(of("tier_budget_bytes"), "tier"), "{{tier}}, budget"),
                Target(total(of("tier_peak_bytes"), "tier"), "{{tier}}, peak"),
            ),
        ),
        Panel(
            "Fill",
            "Bytes in parts of the budget, where there is one.",
            "percentunit",
            (Target(ratio(total(of("tier_bytes"), "tier"), total(of("tier_budget_bytes"), "tier")), "{{tier}}"),),
        ),
        Panel(
            "Entries",
            "Residuals that a tier holds.",
            "short",
            (Target(total(of("tier_entries"), "tier"), "{{tier}}"),),
            stacked=True,
        ),
    ),
)
_READS = Row(
    "Reads",
    (
        Panel(
            "Hits by tier",
            "Of the reads that came to a tier, the share that it had when they were asked for.",
            "percentunit",
            (
                Target(
                    ratio(rate("tier_lookups_total", "tier", result="hit"), rate("tier_lookups_total", "tier")),
                    "{{tier}}",
                ),
            ),
        ),
        Panel(
            "Prefetch outcomes",
            "What became of the reads that were brought ahead of their use.",
            "short",
            (
                Target(rate("prefetches_total", "prefetch"), "{{prefetch}}"),
                Target(rate("prefetches_requested_total"), "requested"),
            ),
        ),
        Panel(
            "Prefetches in time",
            "Share of the prefetches that were in place when they were needed.",
            "percentunit",
            (Target(ratio(rate("prefetches_total", prefetch="useful"), _ENDED), "in time"),),
        ),
        Panel(
            "Waiting",
            "Seconds a second that committed segments waited for residuals that came late, or for room.",
            "s",
            (Target(rate("reuse_wait_seconds_total"), "waiting"),),
        ),
        Panel(
            "Reuse",
            "Residuals that committed segments read of others and wrote for others.",
            "Bps",
            (Target(rate("reuse_bytes_total", "direction"), "{{direction}}"),),
        ),
        Panel(
            "Wasted",
            "Bytes a second that were brought and not read.",
            "Bps",
            (Target(rate("prefetch_wasted_bytes_total"), "wasted"),),
        ),
    ),
)
_WAYS = Row(
    "Moves and losses",
    (
        Panel(
            "Moves",
            "Bytes a second between tiers. What is evicted from the host tier is on disk already.",
            "Bps",
            (
                Target(
                    rate("tier_moved_bytes_total", "source", "target", "cause"), "{{source}} to {{target}}, {{cause}}"
                ),
            ),
        ),
        Panel(
            "Time of a move",
            "The mean from its decision to its end.",
            "s",
            (
                Target(
                    ratio(
                        rate("tier_move_seconds_total", move="disk_to_host"),
                        rate("tier_moves_total", source="disk", target="host"),
                    ),
                    "disk to host",
                ),
                Target(
                    ratio(
                        rate("tier_move_seconds_total", move="host_to_disk"),
                        rate("tier_moves_total", source="host", target="disk"),
                    ),
                    "host to disk",
                ),
            ),
        ),
        Panel(
            "Entries that left",
            "Entries a second that left all tiers; `dead` ones were read for the last time.",
            "short",
            (Target(rate("entries_dropped_total", "reason"), "{{reason}}"),),
        ),
        Panel(
            "Disk faults",
            "What went wrong with files of the disk tier, a minute.",
            "short",
            (Target(f"{rate('disk_faults_total', 'fault')} * 60", "{{fault}}"),),
            width=12,
        ),
        Panel(
            "Refusals",
            "What the CacheStore refused, a minute.",
            "short",
            (Target(f"{rate('refusals_total', 'refusal')} * 60", "{{refusal}}"),),
            width=12,
        ),
    ),
)

DASHBOARD = Dashboard("tiers", "Tiers", "What the tiers hold, and how residuals move.", (_HELD, _READS, _WAYS))
