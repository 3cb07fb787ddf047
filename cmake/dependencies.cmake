# Libraries that the build takes from the system, each with the package that holds it.
function(mustafar_missing what debian)
  message(FATAL_ERROR "mustafar: ${what} was not found. On Debian or Ubuntu: apt-get install ${debian}")
endfunction()

find_package(Threads REQUIRED)

find_package(nlohmann_json 3.10 QUIET)
if(NOT nlohmann_json_FOUND)  # its PyPI package, as a wheel's build has it
  find_package(Python 3.10 QUIET COMPONENTS Interpreter)
  if(Python_FOUND)
    execute_process(COMMAND ${Python_EXECUTABLE} -c
      "import nlohmann_json, os; print(os.path.dirname(nlohmann_json.__file__), end='')"
      OUTPUT_VARIABLE nlohmann_json_package ERROR_QUIET)
  endif()
  find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp HINTS ${nlohmann_json_package}/include)
  if(NOT NLOHMANN_JSON_INCLUDE_DIR)
    mustafar_missing("nlohmann-json" "nlohmann-json3-dev")
  endif()
  add_library(nlohmann_json INTERFACE)
  add_library(nlohmann_json::nlohmann_json ALIAS nlohmann_json)
  target_include_directories(nlohmann_json SYSTEM INTERFACE ${NLOHMANN_JSON_INCLUDE_DIR})
endif()

# Static archives, so that wheels and installed libraries carry them.
find_path(PCRE2_INCLUDE_DIR pcre2.h)
find_library(PCRE2_LIBRARY NAMES libpcre2-8.a)
if(NOT PCRE2_INCLUDE_DIR OR NOT PCRE2_LIBRARY)
  mustafar_missing("PCRE2 (static library)" "libpcre2-dev")
endif()
add_library(mustafar_pcre2 INTERFACE)
target_include_directories(mustafar_pcre2 SYSTEM INTERFACE ${PCRE2_INCLUDE_DIR})
target_compile_definitions(mustafar_pcre2 INTERFACE PCRE2_CODE_UNIT_WIDTH=8 PCRE2_STATIC)
target_link_libraries(mustafar_pcre2 INTERFACE $<BUILD_INTERFACE:${PCRE2_LIBRARY}>)

if(MUSTAFAR_BUILD_CLI)
  find_package(CLI11 QUIET)
  if(NOT CLI11_FOUND)
    mustafar_missing("CLI11" "libcli11-dev")
  endif()
  find_path(LIBEDIT_INCLUDE_DIR histedit.h)
  find_library(LIBEDIT_LIBRARY NAMES libedit.a)
  find_library(TINFO_LIBRARY NAMES libtinfo.a)
  find_library(BSD_LIBRARY NAMES libbsd.a)
  find_library(MD_LIBRARY NAMES libmd.a)
  if(NOT LIBEDIT_INCLUDE_DIR OR NOT LIBEDIT_LIBRARY OR NOT TINFO_LIBRARY OR NOT BSD_LIBRARY
     OR NOT MD_LIBRARY)
    mustafar_missing("libedit (static library)" "libedit-dev")
  endif()
  add_library(mustafar_libedit INTERFACE)
  target_include_directories(mustafar_libedit SYSTEM INTERFACE ${LIBEDIT_INCLUDE_DIR})
  target_link_libraries(mustafar_libedit INTERFACE
    ${LIBEDIT_LIBRARY} ${TINFO_LIBRARY} ${BSD_LIBRARY} ${MD_LIBRARY})
endif()

if(MUSTAFAR_BUILD_TESTS)
  find_package(GTest QUIET)
  if(NOT GTest_FOUND)
    mustafar_missing("GoogleTest" "libgtest-dev")
  endif()
endif()
