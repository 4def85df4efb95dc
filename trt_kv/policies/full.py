"""The whole cache: the baseline that other policies are compared with."""

from trt_kv.policy import Policy

POLICY = Policy(name="full", summary="keep every token of every layer")
