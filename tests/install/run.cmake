# Installs the build into an empty prefix, builds the example program against it out of the source
# tree, and runs that on a model. Variables: BUILD, SOURCE, WORK, GENERATOR, COMPILER, WITH_CUDA.
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output
    ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    string(REPLACE ";" " " command "${ARGN}")
    message(FATAL_ERROR "${command}\nfailed (${result}):\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
# Moved, so that no path of the first prefix can be what makes it work.
file(RENAME ${WORK}/prefix ${WORK}/moved)
file(COPY ${SOURCE}/examples/cpp DESTINATION ${WORK}/source)
run(${CMAKE_COMMAND} -S ${WORK}/source/cpp -B ${WORK}/build -G ${GENERATOR}
  -DCMAKE_CXX_COMPILER=${COMPILER} -DCMAKE_PREFIX_PATH=${WORK}/moved)
run(${CMAKE_COMMAND} --build ${WORK}/build)

# Without CMake: every public header with the warnings that a careful project has on, and the same
# program by pkg-config.
file(GLOB headers RELATIVE ${WORK}/moved/include ${WORK}/moved/include/mustafar/*.h)
list(TRANSFORM headers REPLACE "(.+)" "#include <\\1>\n")
list(JOIN headers "" includes)
file(WRITE ${WORK}/headers.cc "${includes}
#if MUSTAFAR_VERSION_MAJOR * 100 + MUSTAFAR_VERSION_MINOR < 1
#error \"the version is not there\"
#endif
int main() {
  const mustafar::ModelOptions model{.threads = 2};
  const mustafar::KVConfig kv{.window = 16};
  const mustafar::SamplingParams sampling{.temperature = 0};
  const mustafar::BatchOptions batch{.max_batch = 4};
  const mustafar::ChatOptions chat{.system = \"Be brief.\"};
  return model.threads + kv.window + batch.max_batch + static_cast<int>(*sampling.temperature) -
         (chat.system ? 22 : 0);
}
")
run(${COMPILER} -std=c++20 -Wall -Wextra -Wpedantic -Wshadow -Werror -I${WORK}/moved/include
  ${WORK}/headers.cc -o ${WORK}/headers)
run(${WORK}/headers)
find_program(pkg_config pkg-config)
if(pkg_config)
  file(GLOB_RECURSE pc ${WORK}/moved/*.pc)
  get_filename_component(pc ${pc} DIRECTORY)
  run(${CMAKE_COMMAND} -E env PKG_CONFIG_PATH=${pc} ${pkg_config} --cflags --libs mustafar)
  string(STRIP "${output}" flags)
  separate_arguments(flags UNIX_COMMAND "${flags}")
  run(${COMPILER} -std=c++20 ${WORK}/source/cpp/continue_text.cc ${flags} -o ${WORK}/by_pkg_config)
endif()
file(GLOB_RECURSE licences ${WORK}/moved/share/doc/*.txt ${WORK}/moved/share/doc/LICENSE)
list(LENGTH licences n_licences)
if(n_licences LESS 2)
  message(FATAL_ERROR "licences in the prefix: ${licences}")
endif()

foreach(file bash-completion/completions/mustafar zsh/site-functions/_mustafar
        fish/vendor_completions.d/mustafar.fish)
  file(READ ${WORK}/moved/share/${file} script)
  if(NOT script MATCHES "top-k")
    message(FATAL_ERROR "no completion in share/${file}:\n${script}")
  endif()
endforeach()

foreach(model ${SOURCE}/python/mustafar/models/demo ${SOURCE}/../shared/data/models/story)
  if(NOT EXISTS ${model}/config.json)
    continue()
  endif()
  run(${WORK}/build/continue_text ${model} "def read_file(")
  message(STATUS "${output}")
  if(NOT output MATCHES "^def read_file\\(.+\n[0-9]+ tokens, KV cache [0-9]+ bytes")
    message(FATAL_ERROR "the example printed:\n${output}")
  endif()
  set(ran TRUE)
endforeach()
set(demo ${SOURCE}/python/mustafar/models/demo)
if(EXISTS ${demo}/config.json)
  run(${WORK}/build/call_tools ${demo} "What is a list?")
  if(NOT output MATCHES "[a-z]")
    message(FATAL_ERROR "the example with tools printed:\n${output}")
  endif()
endif()

# Whether the installed library is the one with CUDA shows in what it says where no GPU is visible.
execute_process(
  COMMAND ${CMAKE_COMMAND} -E env CUDA_VISIBLE_DEVICES=-1 ${WORK}/build/continue_text
    ${SOURCE}/python/mustafar/models/demo "x" cuda
  RESULT_VARIABLE result ERROR_VARIABLE refusal OUTPUT_QUIET)
if(WITH_CUDA)
  set(expected "libcuda.so.1|finds no NVIDIA GPU")
else()
  set(expected "this build has no CUDA")
endif()
if(NOT result EQUAL 1 OR NOT refusal MATCHES "^error: device \"cuda\": .*(${expected})")
  message(FATAL_ERROR "with device cuda the example ended with ${result} and said:\n${refusal}")
endif()
if(NOT ran)
  message(STATUS "SKIPPED: no model folder to run the example on; it was built")
endif()
