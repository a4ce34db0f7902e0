"""Says why a run is stuck: findings with evidence, rivals ruled out, remedies tried beside a control."""

from unstuck.diagnosis._findings import Arm, Diagnosis, Evidence, Finding, RuledOut, Trial

__all__ = ["Arm", "Diagnosis", "Evidence", "Finding", "RuledOut", "Trial"]
