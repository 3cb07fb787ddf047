# What `cmake --install` puts where: headers, the library, a CMake package that links without further
# knowledge, the command and the demo model; and, for a wheel, the extension and the command.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# The licences of the libraries inside.
function(mustafar_install_licences)
  foreach(package libpcre2-dev libedit-dev libbsd-dev libmd-dev libncurses-dev libcli11-dev
          nlohmann-json3-dev)
    if(EXISTS /usr/share/doc/${package}/copyright)
      install(FILES /usr/share/doc/${package}/copyright RENAME ${package}.txt ${ARGN})
    endif()
  endforeach()
endfunction()

if(SKBUILD)
  install(TARGETS _core LIBRARY DESTINATION mustafar COMPONENT python)
  if(TARGET mustafar_command)
    install(TARGETS mustafar_command RUNTIME DESTINATION ${SKBUILD_SCRIPTS_DIR} COMPONENT python)
  endif()
  mustafar_install_licences(DESTINATION mustafar/licenses COMPONENT python)
  return()
endif()

set(MUSTAFAR_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/mustafar)
set(MUSTAFAR_ARCHIVE_DIR ${CMAKE_INSTALL_LIBDIR}/mustafar)

# PCRE2 and the CUDA runtime are installed beside the library: what links mustafar needs nothing from
# the system, and no toolkit.
target_link_libraries(mustafar PRIVATE $<INSTALL_INTERFACE:mustafar::pcre2>)
install(FILES ${PCRE2_LIBRARY} DESTINATION ${MUSTAFAR_ARCHIVE_DIR})
if(MUSTAFAR_WITH_CUDA)
  target_link_libraries(mustafar PRIVATE $<INSTALL_INTERFACE:mustafar::cudart>)
  install(FILES ${CUDA_cudart_static_LIBRARY} DESTINATION ${MUSTAFAR_ARCHIVE_DIR})
endif()

install(TARGETS mustafar EXPORT mustafar-targets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY cpp/include/mustafar ${PROJECT_BINARY_DIR}/cpp/include/mustafar
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT mustafar-targets NAMESPACE mustafar:: DESTINATION ${MUSTAFAR_CMAKE_DIR})
configure_package_config_file(cmake/mustafar-config.cmake.in mustafar-config.cmake
  INSTALL_DESTINATION ${MUSTAFAR_CMAKE_DIR} PATH_VARS MUSTAFAR_ARCHIVE_DIR)
write_basic_package_version_file(mustafar-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/mustafar-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/mustafar-config-version.cmake DESTINATION ${MUSTAFAR_CMAKE_DIR})

# For builds without CMake.
set(MUSTAFAR_PC_LIBS "-L\${libdir}/mustafar -lpcre2-8 -pthread")
if(MUSTAFAR_WITH_CUDA)
  string(APPEND MUSTAFAR_PC_LIBS " -lcudart_static -ldl -lrt")
endif()
file(RELATIVE_PATH MUSTAFAR_PC_TO_PREFIX
  ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
configure_file(cmake/mustafar.pc.in mustafar.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/mustafar.pc
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
mustafar_install_licences(DESTINATION ${CMAKE_INSTALL_DOCDIR}/licenses)

if(TARGET mustafar_command)
  install(TARGETS mustafar_command RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  if(NOT CMAKE_CROSSCOMPILING)  # the command writes them, once it is installed
    install(CODE "set(command \"\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_BINDIR}/mustafar\")
set(data \"\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_DATADIR}\")")
    install(CODE [[
foreach(file "bash:bash-completion/completions/mustafar" "zsh:zsh/site-functions/_mustafar"
        "fish:fish/vendor_completions.d/mustafar.fish")
  string(REGEX MATCH "^([a-z]+):(.*)/([^/]+)$" _ "${file}")
  set(shell ${CMAKE_MATCH_1})
  set(folder "${data}/${CMAKE_MATCH_2}")
  set(name ${CMAKE_MATCH_3})
  file(MAKE_DIRECTORY "$ENV{DESTDIR}${folder}")
  execute_process(COMMAND "$ENV{DESTDIR}${command}" completion ${shell}
    OUTPUT_FILE "$ENV{DESTDIR}${folder}/${name}" COMMAND_ERROR_IS_FATAL ANY)
  message(STATUS "Installing: $ENV{DESTDIR}${folder}/${name}")
  list(APPEND CMAKE_INSTALL_MANIFEST_FILES "${folder}/${name}")
endforeach()]])
  endif()
endif()
if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/python/mustafar/models/demo)
  install(DIRECTORY python/mustafar/models/demo
    DESTINATION ${CMAKE_INSTALL_DATADIR}/mustafar/models)
endif()
