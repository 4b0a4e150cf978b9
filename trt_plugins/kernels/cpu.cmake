# The CPU implementation as objects: `svdit_cpu`. Needs a C++ compiler and nothing else. What one thread does is
# compiled for AVX2 with FMA on x86-64 beside the baseline; the choice is made when it runs.
set(SVDIT_CPU_OPTIONS -Wall -Wextra -Wno-psabi -O3 -ffp-contract=fast)

add_library(svdit_cpu_baseline OBJECT ${CMAKE_CURRENT_LIST_DIR}/cpu_attend.cpp)
target_compile_definitions(svdit_cpu_baseline PRIVATE SVDIT_CPU_SIZES)
set(SVDIT_CPU_TARGETS svdit_cpu_baseline)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  add_library(svdit_cpu_avx2 OBJECT ${CMAKE_CURRENT_LIST_DIR}/cpu_attend.cpp)
  target_compile_definitions(svdit_cpu_avx2 PRIVATE SVDIT_CPU_AVX2 SVDIT_CPU_ENTRY=cpu_attend_avx2)
  target_compile_options(svdit_cpu_avx2 PRIVATE -mavx2 -mfma)
  list(APPEND SVDIT_CPU_TARGETS svdit_cpu_avx2)
endif()

add_library(svdit_cpu_tasks OBJECT ${CMAKE_CURRENT_LIST_DIR}/cpu_sparse_attention.cpp)
if(TARGET svdit_cpu_avx2)
  target_compile_definitions(svdit_cpu_tasks PRIVATE SVDIT_CPU_AVX2)
endif()
list(APPEND SVDIT_CPU_TARGETS svdit_cpu_tasks)

add_library(svdit_cpu INTERFACE)
foreach(target IN LISTS SVDIT_CPU_TARGETS)
  target_compile_features(${target} PRIVATE cxx_std_17)
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_LIST_DIR}/../include)
  target_compile_options(${target} PRIVATE ${SVDIT_CPU_OPTIONS})
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
  target_sources(svdit_cpu INTERFACE $<TARGET_OBJECTS:${target}>)
endforeach()
