# The core for those who embed it: libmemferry.so (the C interface alone), libmemferry.a (that, and the C++ classes for
# who takes their headers), and what find_package(memferry) and pkg-config need of both. `cmake --install`.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

check_include_file_cxx(nlohmann/json.hpp MEMFERRY_HAVE_JSON)
if(NOT MEMFERRY_HAVE_JSON)
  message(FATAL_ERROR "nlohmann/json.hpp is missing: install nlohmann-json3-dev (Debian, Ubuntu) or json-devel (Fedora)")
endif()

file(GLOB MEMFERRY_EMBED_SOURCES CONFIGURE_DEPENDS native/control/*.cc native/capi/*.cc)
add_library(memferry_embed STATIC ${MEMFERRY_EMBED_SOURCES})
target_link_libraries(memferry_embed PUBLIC memferry_core)
target_precompile_headers(memferry_embed PRIVATE ${MEMFERRY_STANDARD_HEADERS} <nlohmann/json.hpp>)

# The same objects in two libraries; what a program links is called memferry::shared and memferry::static.
set(MEMFERRY_OBJECTS $<TARGET_OBJECTS:memferry_core> $<TARGET_OBJECTS:memferry_embed>)
set(MEMFERRY_EXPORTS ${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map)

add_library(memferry_shared SHARED ${MEMFERRY_OBJECTS})
set_target_properties(memferry_shared PROPERTIES OUTPUT_NAME memferry EXPORT_NAME shared LINKER_LANGUAGE CXX
  VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR} LINK_DEPENDS ${MEMFERRY_EXPORTS})
target_link_options(memferry_shared PRIVATE -Wl,--version-script=${MEMFERRY_EXPORTS} -Wl,--no-undefined)
target_link_libraries(memferry_shared PRIVATE ${MEMFERRY_LIBRARY_lz4} ${MEMFERRY_LIBRARY_zstd} OpenSSL::Crypto
  Threads::Threads)
target_include_directories(memferry_shared INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)

add_library(memferry_static STATIC ${MEMFERRY_OBJECTS})
set_target_properties(memferry_static PROPERTIES OUTPUT_NAME memferry EXPORT_NAME static LINKER_LANGUAGE CXX)
target_link_libraries(memferry_static INTERFACE
  $<INSTALL_INTERFACE:memferry::lz4> $<INSTALL_INTERFACE:memferry::zstd> OpenSSL::Crypto Threads::Threads)
target_include_directories(memferry_static INTERFACE
  $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/memferry/core>)
target_compile_features(memferry_static INTERFACE cxx_std_20)

# A sanitizer's runtime is the program's to have: no library of that kind is made unless it is asked for.
if(MEMFERRY_SANITIZE)
  set_target_properties(memferry_shared memferry_static PROPERTIES EXCLUDE_FROM_ALL TRUE)
endif()

set(MEMFERRY_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/memferry)
install(FILES native/capi/memferry.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
# The C++ classes: for the static library, with no promise between versions.
install(DIRECTORY native/os native/page native/track native/wire native/fault native/stage native/share native/transfer
                  native/spread native/restore native/control
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/memferry/core FILES_MATCHING PATTERN *.h)
install(TARGETS memferry_shared memferry_static EXPORT memferry
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT memferry NAMESPACE memferry:: FILE memferryTargets.cmake DESTINATION ${MEMFERRY_PACKAGE_DIR})
configure_package_config_file(cmake/memferryConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/memferryConfig.cmake
  INSTALL_DESTINATION ${MEMFERRY_PACKAGE_DIR})
# Before 1.0 the minor number says what fits.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/memferryConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/memferryConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/memferryConfigVersion.cmake
  DESTINATION ${MEMFERRY_PACKAGE_DIR})
# Where it is installed is known only then: relative to the file itself.
file(RELATIVE_PATH MEMFERRY_PREFIX_FROM_PC
  /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
string(REGEX REPLACE "/$" "" MEMFERRY_PREFIX_FROM_PC "${MEMFERRY_PREFIX_FROM_PC}")
configure_file(cmake/memferry.pc.in ${CMAKE_CURRENT_BINARY_DIR}/memferry.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/memferry.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
