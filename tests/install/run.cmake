# Installs the build into an empty prefix, builds the example program against it out of the source
# tree, and runs that on a model. Variables: BUILD, SOURCE, WORK, GENERATOR, COMPILER.
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
if(NOT ran)
  message(STATUS "SKIPPED: no model folder to run the example on; it was built")
endif()
