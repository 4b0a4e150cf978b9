// Drives the built plugin as TensorRT would, without TensorRT: only its headers are used.
//
//   svdit_abi_host LIBRARY lifecycle    create, clone, shapes, formats, store, restore, contexts, threads; no GPU
//   svdit_abi_host LIBRARY refusals     bad attributes, types, shapes and pointers; no GPU
//   svdit_abi_host LIBRARY gpu CASES    folder of golden cases by abi_cases.py: launches and CUDA graphs of each
//   svdit_abi_host LIBRARY threads CASE one of them: eight contexts in as many threads, 100 runs each
#include <cstdio>
#include <exception>

#include "lifecycle.h"

int main(int argc, char **argv) {
  const std::string mode = argc > 2 ? argv[2] : "";
  try {
    if (argc == 3 && mode == "lifecycle") {
      abi_host::run_lifecycle(argv[1]);
    } else if (argc == 3 && mode == "refusals") {
      abi_host::run_refusals(argv[1]);
    } else if (argc == 4 && mode == "gpu") {
      abi_host::run_on_gpu(argv[1], argv[3]);
    } else if (argc == 4 && mode == "threads") {
      abi_host::run_threads(argv[1], argv[3]);
    } else {
      std::fprintf(stderr, "usage: %s LIBRARY lifecycle | refusals | gpu CASES | threads CASE\n", argv[0]);
      return 2;
    }
  } catch (const std::exception &error) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
