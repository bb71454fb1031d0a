"""An onnxruntime stand-in: sessions with recorded providers, options and node assignments."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

from bntool.runtime.libraries import CPU, CUDA, TENSORRT


class Recorded:
    """`honours` names the providers that load here, `nodes` where ONNX Runtime puts each op."""

    __file__ = "/nowhere/onnxruntime/__init__.py"
    __version__ = "1.0"

    def __init__(
        self,
        *,
        honours: bool | Sequence[str],
        nodes: dict[str, str],
        strict_works: bool,
        tf32: str = "0",
        runs: Any = None,
    ) -> None:
        self.created: list[tuple[Any, dict[str, str]]] = []
        self.told: dict[str, Any] = {}
        recorded = self
        loads = ([CUDA] if honours else []) if isinstance(honours, bool) else list(honours)

        class SessionOptions:
            def __init__(self) -> None:
                self.config: dict[str, str] = {}

            def add_session_config_entry(self, key: str, value: str) -> None:
                self.config[key] = value

        class InferenceSession:
            def __init__(self, model: Any, options: Any, providers: Any) -> None:
                recorded.created.append((providers, options.config))
                recorded.told = vars(options)
                print("*************** EP Error ***************")
                strict = "session.disable_cpu_ep_fallback" in options.config
                if strict and not strict_works:
                    raise RuntimeError("nodes are assigned to the default CPU EP")
                if model == "broken.onnx":
                    raise RuntimeError("[ONNXRuntimeError] : 10 : INVALID_GRAPH : no such op\nmore")
                asked = {p[0]: p[1] for p in providers if isinstance(p, tuple)}
                self.options = {name: options for name, options in asked.items() if name in loads}

            def get_providers(self) -> list[str]:
                return [*self.options, CPU]

            def get_provider_options(self) -> dict[str, dict[str, str]]:
                return {
                    name: {**asked, **({"use_tf32": tf32} if name == CUDA else {})}
                    for name, asked in self.options.items()
                }

            def get_provider_graph_assignment_info(self) -> list[Any]:
                return [
                    types.SimpleNamespace(
                        ep_name=where,
                        get_nodes=lambda op=op: [types.SimpleNamespace(op_type=op, name=f"{op}_1")],
                    )
                    for op, where in nodes.items()
                ]

            def run(self, names: Any, feeds: Any) -> Any:
                if isinstance(runs, Exception):
                    raise runs
                return [runs]

        self.SessionOptions, self.InferenceSession = SessionOptions, InferenceSession
        self.GraphOptimizationLevel = types.SimpleNamespace(ORT_ENABLE_ALL=99, ORT_DISABLE_ALL=0)

    def set_default_logger_severity(self, level: int) -> None: ...

    def preload_dlls(self) -> None:
        print("a banner")

    def get_available_providers(self) -> list[str]:
        return [TENSORRT, CUDA, CPU]

    def get_all_providers(self) -> list[str]:
        return [TENSORRT, CUDA, "OpenVINOExecutionProvider", "CoreMLExecutionProvider", CPU]
