"""The causes that only a measurement tells apart: what each predicts, what refutes it, and what should cure it."""

from unstuck.diagnosis import _capacity as capacity
from unstuck.diagnosis import _data as data
from unstuck.diagnosis import _layers as layers
from unstuck.diagnosis import _motion as motion
from unstuck.diagnosis import _restarts as restarts
from unstuck.diagnosis import _separable as separable
from unstuck.diagnosis import _settings as settings
from unstuck.diagnosis import _start as start
from unstuck.diagnosis import _structure as structure
from unstuck.diagnosis._begins import BEGINS, SATURATED
from unstuck.diagnosis._case import Measure
from unstuck.diagnosis._given import GIVEN
from unstuck.diagnosis._hypothesis import Hypothesis
from unstuck.diagnosis._limits import POOR, SEPARABLE, SMALL
from unstuck.diagnosis._origins import ORIGINS
from unstuck.diagnosis._steps import STEPS

MEASURES: dict[str, Measure] = {
    "trend": motion.trend,
    "loss over chance": motion.level,
    "rise of the loss": motion.rise,
    "loss over its lowest": motion.risen,
    "steps at chance": motion.waited,
    "input dependence": structure.input_dependence,
    "dead units": structure.dead_share,
    "saturation": structure.saturation,
    "flat activations": structure.flatness,
    "units at rest": structure.at_rest,
    "smallest signal": structure.smallest_scale,
    "signal into the dead layer": structure.dead_signal,
    "relative gradient": structure.relative_gradient,
    "zero gradients": structure.zero_gradients,
    "zero weights at the start": structure.zero_at_start,
    "growth of the weights": structure.growth,
    "head-room": motion.head_room,
    "head-room elsewhere": motion.head_room_elsewhere,
    "drift gain": motion.drift_gain,
    "under ε": motion.under_epsilon,
    "curvature × rate": motion.curvature_times_rate,
    "curvature × rate at the start": motion.curvature_at_the_start,
    "different batches": motion.different_batches,
    "escape gain": motion.escape_gain,
    "what clipping leaves": settings.clip_ratio,
    "share of weight decay": settings.decay_share,
    "momentum": settings.momentum,
    "steps at a lost rate": settings.rate_lost,
    "rise of the rate": settings.rate_rising,
    "fall of the rate": settings.rate_fallen,
    "schedule calls": settings.schedule_calls,
    "misuse of the schedule": settings.misuse,
    "loss at the start": start.level_at_start,
    "signal at the start": start.signal_at_start,
    "saturation at the start": start.saturation_at_start,
    "constant part of the outputs": start.offset_at_start,
    "smallest signal at the start": start.smallest_at_start,
    "gain of the first layer": start.first_gain,
    "size of the outputs at the start": start.outputs_at_start,
    "scale of the inputs": start.unscaled,
    "gradient of the first layer": structure.first_gradient,
    "gradient of the first layer at the start": structure.first_gradient_at_start,
    "squashing layers": structure.squashing_layers,
    "longest row": data.outlying,
    "mixture of a batch": data.mixed,
    "what neighbours tell": data.neighbours,
    "whole batches needed": settings.whole_batches,
    "columns that vary": data.varying,
    "batch over the data": data.share_of_the_data,
    "rows on the wrong side": separable.wrong_side,
    "on the wrong side under a logistic loss": separable.under_logistic,
    "on the wrong side under its own loss": separable.under_squared,
    "loss of the same rows": capacity.left,
    "what a wide network leaves": capacity.wide,
    "what its own network gains": capacity.gained,
    "what its own start reaches": restarts.own_start,
    "what another start reaches": restarts.other_starts,
    "dropout": layers.dropout_rate,
    "numbers to a norm": layers.rows_per_norm,
    "scale of the loss": layers.loss_scale,
    "size of the inputs": start.input_scale,
    "offset of the inputs": start.input_offset,
    "spread of the inputs": start.input_spread,
}


HYPOTHESES: tuple[Hypothesis, ...] = (SEPARABLE, *GIVEN, *BEGINS, *ORIGINS, SATURATED, *STEPS, SMALL, POOR)
