from rlsys.batch.proto import DataProto

__all__ = ["DataProto"]
