# Read by ctest: tests that want the machine to themselves, for they count bounds in real time under the most load, or
# change what there is one of (huge pages, swap). And those that take minutes under a sanitizer, all of it CPU: they begin first.
foreach(test IN LISTS memferry_native_tests)
  if(test MATCHES "ScatterSchedules|HugePages|HugePaging|SwappedMemory|LargePages|SnapshotPager")
    set_tests_properties("${test}" PROPERTIES RUN_SERIAL ON)
  elseif(test MATCHES "ContentModel|PageShareTest|AFloodOfDomains")
    set_tests_properties("${test}" PROPERTIES COST 100)
  endif()
endforeach()
